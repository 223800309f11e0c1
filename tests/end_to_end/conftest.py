"""A toy with the stages before an end-to-end phase, and recipes that go on from them."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import write_recipe
from phases import PHASE, STAGES


@pytest.fixture(scope="session")
def made(finished) -> tuple[Path, Path]:
    """Toy model and an output folder that holds its finished ptq, distill and act-calib stages."""
    return finished(*STAGES)


@pytest.fixture
def run(made, tmp_path):
    """run(distill=..., act_calib=...): a recipe with these end-to-end phases, in a folder that holds the stages before."""
    toy, output = made
    for stage in STAGES:
        shutil.copytree(output / stage, tmp_path / "run" / stage)

    def recipe(name: str = "r", distill: dict | None = None, act_calib: dict | None = None, **sections) -> Path:
        phases = {
            "distill": {"epochs": 1} | ({"end_to_end": {**PHASE, **distill}} if distill is not None else {}),
            "act_calib": {"epochs": 1} | ({"end_to_end": {**PHASE, **act_calib}} if act_calib is not None else {}),
        }
        return write_recipe(tmp_path / f"{name}.yaml", toy, tmp_path / "run", **phases, **sections)

    return recipe


@pytest.fixture
def other_disk(tmp_path):
    """A folder on another disk than the run's."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one disk only")
    with TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
