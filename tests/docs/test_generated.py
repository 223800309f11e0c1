"""Pages and drawings that scripts write are what the code says, and the check finds one that is not."""

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
import yaml
from conftest import ROOT

from lbllm_cli.recipe.schema import Recipe

SCRIPTS = ("recipe_reference",)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_written_is_up_to_date(name):
    found = subprocess.run([sys.executable, ROOT / "scripts" / f"{name}.py", "--check"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_a_stale_reference_is_found_and_written_anew(tmp_path, monkeypatch, capsys):
    module = script("recipe_reference")
    page = tmp_path / "recipe.md"
    monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["recipe_reference.py", "--check"])
    assert module.main() == 1
    page.write_text(module.page().replace("`128`", "`64`", 1), encoding="utf-8")
    assert module.main() == 1
    assert "python scripts/recipe_reference.py" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["recipe_reference.py"])
    assert module.main() == 0
    monkeypatch.setattr(sys, "argv", ["recipe_reference.py", "--check"])
    assert module.main() == 0


def test_every_key_has_a_row_with_its_default():
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    phase = {"end_to_end": {}}
    values = {"model": {"path": "none: give one"}, "output": {"dir": "none: give one"}, "distill": phase, "act_calib": phase}

    def check(section: dict, heading: str) -> int:
        _, found, table = text.partition(f"\n## {heading}\n")
        assert found, heading
        rows = [line.split(" | ") for line in table.partition("\n## ")[0].splitlines() if line.startswith("| `")]
        defaults = {row[0].strip("|` "): row[-2].strip("`") for row in rows}
        assert defaults.keys() == section.keys()
        counted = len(defaults)
        for key, value in section.items():
            if isinstance(value, dict):
                counted += check(value, f"{heading}.{key}")
            elif not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
                assert yaml.safe_load(defaults[key]) == (value if value != "none: give one" else {"none": "give one"}), key
        return counted

    dumped = Recipe.model_validate(values).model_dump(mode="json")
    del dumped["recipe_version"]
    assert sum(check(section, name) for name, section in dumped.items()) > 100
