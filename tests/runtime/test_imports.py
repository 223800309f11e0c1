"""What loading an export imports, and who asks for a device."""

import ast
import json
import subprocess
import sys

from conftest import ROOT

SOURCES = ROOT / "src" / "lbllm_cli"
ALLOWED = {"core", "format", "runtime", "hf"}

_CODE = """
import json, sys
import torch, transformers, transformers.quantizers.auto, safetensors, pydantic  # these bring what they need themselves
for name in ("fcntl", "resource", "pwd", "grp"):
    sys.modules[name] = None  # as on a system that does not have them
import lbllm_cli.hf
print(json.dumps(sorted(name for name in sys.modules if name.startswith("lbllm_cli."))))
"""


def test_the_plugin_imports_format_and_runtime_alone_and_nothing_of_one_system():
    result = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
    loaded = json.loads(result.stdout)
    assert "lbllm_cli.runtime.linear" in loaded
    assert {name.split(".")[1] for name in loaded} <= ALLOWED
    assert "lbllm_cli.core.lock" not in loaded


def test_only_backends_ask_for_a_device():
    asked = []
    for path in SOURCES.rglob("*.py"):
        place = path.relative_to(SOURCES)
        if place.parts[0] == "runtime" and (len(place.parts) == 3 or place.name == "backend.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda", "xpu", "mps"):
                asked.append(f"{place}:{node.lineno}")
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == "type":
                values = [value.value for value in node.comparators if isinstance(value, ast.Constant)]
                asked += [f"{place}:{node.lineno}" for value in values if value in ("cpu", "cuda", "meta")]
    assert not asked


def test_no_module_takes_another_class_or_counts_hooks():
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign):
                targets = [part for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Attribute)]
                assert not any(part.attr == "__class__" for part in targets), path
