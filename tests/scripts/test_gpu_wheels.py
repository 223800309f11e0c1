"""scripts/gpu_wheels.py: with what it names, beside torch, every slice of scripts/bench/gpu.py can be begun."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

import pytest
from conftest import ROOT, write_recipe

spec = importlib.util.spec_from_file_location("gpu_wheels", ROOT / "scripts" / "gpu_wheels.py")
gpu_wheels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_wheels)

SLICES = """
import sys
sys.path[:] = [*(path for path in sys.path if "-packages" not in path), *sys.argv[1].split(":")]
import gpu, packed_linears, random_models, real_blocks
import pytest, xdist
from transformers import AutoModelForCausalLM
from lbllm_cli.cli.app import app
try:
    import datasets
    sys.exit("what is not named is here all the same")
except ModuleNotFoundError:
    pass
for command in ("ptq", "distill", "act-calib", "eval", "export"):
    try:
        app([command, "--recipe", sys.argv[2]], standalone_mode=True)
    except SystemExit as end:
        if end.code:
            raise
"""


def linked(names: Iterable[str], folder: Path) -> Path:
    """A folder of packages with these and no others."""
    folder.mkdir()
    for name in names:
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
    return folder


def test_versions_are_those_that_are_pinned():
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
    found = gpu_wheels.wanted()
    assert {"transformers", "pydantic-core", "pytest"} <= found.keys()
    assert not {"torch", "datasets", "lm-eval"} & found.keys()
    assert [name for name, version in found.items() if f"{name}=={version}".lower() not in pinned] == []


@pytest.mark.slow
def test_every_slice_begins_with_nothing_else(toy, tmp_path):
    last = {"epochs": 1, "end_to_end": {"sequences": 4}}
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", ptq={"rounds": 0}, distill=last, act_calib=last)
    packages = linked({**gpu_wheels.wanted(), **gpu_wheels.closure(gpu_wheels.THERE)}, tmp_path / "packages")
    places = ":".join(map(str, (packages, ROOT / "src", ROOT / "scripts" / "bench")))
    # -S: without the environment's packages.
    command = [sys.executable, "-S", "-c", SLICES, places, str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
