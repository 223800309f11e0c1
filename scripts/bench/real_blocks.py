"""Two blocks of a real shape with random weights, through the commands: seconds and peak memory of each, beside the forecast."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from random_models import GROUP, config_of, dense_model

TOY = Path(__file__).resolve().parents[2] / "tests/assets/toy"
BLOCKS, LENGTH = 2, 2048
STAGES = ("ptq", "distill", "act-calib")


def write_model(name: str, folder: Path) -> None:
    """The shape's first blocks with random weights in bfloat16, and the toy's tokenizer, whose tokens are among its own."""
    model = dense_model(config_of(name, num_hidden_layers=BLOCKS), torch.device("cuda"))
    model.cpu().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOY / file, folder / file)


def _recipe(folder: Path) -> Path:
    text = {"source": "builtin:calibration", "length": LENGTH}
    step = {"batch_size": 2, "micro_batch_size": 1, "epochs": 1}
    recipe = {
        "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
        "output": {"dir": str(folder / "run")},
        "runtime": {"device": "cuda"},
        "data": {
            "calibration": {**text, "sequences": 32},
            "training": {**text, "sequences": 64},
            "evaluation": [{"name": "novels", "source": "builtin:evaluation/novels", "length": LENGTH, "segments": 2}],
        },
        "ptq": {"group_size": GROUP},
        "distill": step,
        "act_calib": step,
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def _lbllm(*arguments: str) -> str:
    call = [sys.executable, "-m", "lbllm_cli", *arguments]
    ended = subprocess.run(call, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "4"})
    if ended.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit {ended.returncode}\n{ended.stderr[-3000:]}")
    return ended.stdout


def run_blocks(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Facts of each stage: seconds of its last block, the most that torch allocated, and the forecast over it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(name, folder / "model")
    recipe = str(_recipe(folder))
    forecasts = json.loads(_lbllm("validate", "--recipe", recipe, "--json"))["forecast_bytes"]
    for stage in STAGES:
        _lbllm(stage, "--recipe", recipe)
        lines = (folder / "run" / stage / "events.jsonl").read_text(encoding="utf-8").splitlines()
        last = [record for record in map(json.loads, lines) if "block" in record][-1]
        peak, forecast = last["peak_device_bytes"], forecasts[stage]["device"]
        yield {
            "stage": stage, "block_seconds": float(last["seconds"]), "peak_gib": peak / 2**30, "forecast_gib": forecast / 2**30,
            "forecast_over_peak": forecast / peak,
        }  # fmt: skip
