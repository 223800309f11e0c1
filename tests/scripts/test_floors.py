"""scripts/floors.py: what `make test-oldest` installs is the lower bound of everything that pyproject.toml names."""

import re
import runpy
import sys
import tomllib

import pytest
from conftest import ROOT

SCRIPT = ROOT / "scripts" / "floors.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
floors = runpy.run_path(str(SCRIPT))["floors"]


def printed(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """The script's exit code, and what it wrote to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code, *capsys.readouterr()


def test_every_requirement_has_a_floor_and_one_can_be_replaced(monkeypatch, capsys):
    code, out, _ = printed(monkeypatch, capsys, "torch==2.13.0")
    assert code == 0
    lines = out.split()
    named = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    assert len(lines) == len({requirement.split(">=")[0] for one in named for requirement in one})
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines)
    assert "torch==2.13.0" in lines
    (transformers,) = (line for line in PROJECT["dependencies"] if line.startswith("transformers>="))
    assert transformers.split(",")[0].replace(">=", "==") in lines


@pytest.mark.parametrize("requirement", ["numpy", "numpy<3", "numpy~=2.0", "numpy==2.0"])
def test_a_requirement_without_a_floor_is_refused_by_name(requirement):
    with pytest.raises(ValueError, match=f"'{requirement}' has no lower bound"):
        floors({"dependencies": ["torch>=2.6", requirement]})


def test_an_extra_and_an_upper_bound_are_read():
    project = {"dependencies": ["Torch >= 2.6, <3"], "optional-dependencies": {"dev": ["ruff[all]>=0.11; python_version>'3'"]}}
    assert floors(project) == {"torch": "2.6", "ruff": "0.11"}


def test_a_version_of_something_else_is_refused(monkeypatch, capsys):
    code, _, error = printed(monkeypatch, capsys, "scipy==1.0")
    assert code == 2
    assert "scipy==1.0" in error


def test_versions_of_the_pinned_environment_lie_inside_the_ranges():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line)
    for name, floor in floors(PROJECT).items():
        assert [int(part) for part in pins[name].split(".")] >= [int(part) for part in floor.split(".")], name
