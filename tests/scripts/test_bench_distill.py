"""The benchmark of a training step runs where only torch, transformers and safetensors are, and measures what a run does."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from lbllm_cli.recipe.training import Distill

SCRIPT = ROOT / "scripts" / "bench_distill.py"
# accelerate is what would import psutil. transformers cannot do without yaml, so there it is lbllm's one user of yaml.
ABSENT = ("pydantic", "rich", "typer", "datasets", "psutil", "accelerate", "lbllm_cli.recipe.load")
KEYS = {"trained", "seconds", "ratio", "ratio_min", "ratio_max", "tokens_per_second", "peak_bytes", "peak_ratio", "rounds"}


@pytest.fixture
def guarded(tmp_path):
    """Environment of a process in which the packages of the command line cannot be imported."""
    text = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    (tmp_path / "sitecustomize.py").write_text(text, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}


def test_guard_keeps_packages_away(guarded):
    result = subprocess.run([sys.executable, "-c", "import pydantic"], env=guarded, capture_output=True, text=True)
    assert result.returncode != 0
    assert "import of pydantic halted" in result.stderr


@pytest.mark.slow
def test_toy_shape(guarded):
    sizes = ["--rows", "2", "--length", "32", "--group-size", "32", "--steps", "3", "--threads", "1"]
    command = [sys.executable, str(SCRIPT), "--shape", "toy", "--dtype", "float32", "--device", "cpu", *sizes]
    result = subprocess.run(command, env=guarded, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["threads"] == 1
    assert list(report["variants"]) == ["dense", "nearest", "bitmap"]
    for name, record in report["variants"].items():
        assert record.keys() == KEYS
        assert len(record.pop("rounds")) == 3
        expected = ("weights",) if name == "dense" else Distill(parametrisation=name).trained
        assert tuple(record.pop("trained")) == expected
        assert all(value > 0 for value in record.values()), record
        assert record["ratio_min"] <= record["ratio_max"]
    assert report["variants"]["dense"]["ratio"] == report["variants"]["dense"]["peak_ratio"] == 1
    assert "| bitmap |" in result.stderr
    # What is measured is the recipe's default where that changes what a step does.
    assert report["settings"].keys() <= Distill.model_fields.keys()
    for name in ("loss", "polarise", "polarise_beta"):
        assert report["settings"][name] == getattr(Distill(), name)
