"""What cases are copies of: a toy of two blocks, its recipe, a run of every stage, and exports of it."""

import os
import signal
from pathlib import Path
from typing import Any

import yaml
from conftest import save_toy, write_recipe
from mutate import copy_into
from promise import prepare
from runner import Kill, Server

TOY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
RECIPE = "r.yaml"
LAST = {"sequences": 6, "held_out": 0.2}
STAGES = ("ptq", "distill", "distill-e2e", "act-calib", "act-calib-e2e")
# Paths that the commands may touch, and the folder's own lock.
LOCK = ("work/run", "work/run/.lock")


def stage_writes(*stages: str) -> tuple[str, ...]:
    """Patterns for what a stage writes."""
    tails = ("", ".partial", ".replaced")
    patterns = [(f"work/run/{stage}{tail}", f"work/run/{stage}{tail}/*") for stage in stages for tail in tails]
    return (*LOCK, *(pattern for pair in patterns for pattern in pair))


def model(folder: Path) -> Path:
    """A prepared case's folder with `model` and its recipe `r.yaml`, all paths in it relative."""
    work, before = prepare(folder), Path.cwd()
    os.chdir(work)
    try:
        save_toy(Path("model"), **TOY)
        sections: dict[str, Any] = {
            "ptq": {"group_size": 16},
            "distill": {"epochs": 1, "held_out": 0.2, "end_to_end": LAST},
            "act_calib": {"epochs": 1, "held_out": 0.2, "end_to_end": LAST},
        }
        write_recipe(Path(RECIPE), Path("model"), Path("run"), **sections)
    finally:
        os.chdir(before)
    return folder


def run(server: Server, folder: Path, *commands: str) -> Path:
    """`model`, and these commands run on it: "ptq act_calib.epochs=0" is a command with an override."""
    model(folder)
    for command in commands:
        go(server, folder, command)
    return folder


def go(server: Server, folder: Path, command: str) -> None:
    """Runs a command of the recipe, expecting it to finish."""
    name, *others = command.split()
    result = server.run([name, "--recipe", RECIPE, *others], folder)
    assert result.code == 0, result.stderr


def resolved(server: Server, folder: Path) -> dict[str, Any]:
    """The recipe with every key that there is."""
    text = server.run(["config", "--recipe", RECIPE], folder).stdout
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def copied(base: Path, folder: Path) -> Path:
    """A copy of a base for one case: returns the folder that commands run in."""
    copy_into(base, folder)
    return folder / "work"


def build(server: Server, folder: Path, name: str) -> Path:
    """The base of a class of cases."""
    if name in ("recipes", "models", "data"):
        return model(folder)
    if name == "exports":
        return _exports(server, folder)
    run(server, folder, "ptq", "distill", "act-calib", "eval", "report", "export")
    # A stage that was stopped in the middle of its second block.
    line = ["distill", "--only", "blocks", "--force", "--recipe", RECIPE, "runtime.save_minutes=0"]
    whole = server.run(line, folder).operations
    partial = folder / "work" / "run" / "distill.partial"
    for operation in range(whole // 2, whole):
        server.run(line, folder, kill=Kill(signal.SIGTERM, operation=operation))
        if (partial / "training.safetensors").exists() and (partial / "block_000.safetensors").exists():
            return folder
    raise AssertionError("the stage was never in the middle of a block")


def _exports(server: Server, folder: Path) -> Path:
    run(server, folder, "ptq", "export")
    work = folder / "work"
    (work / "run" / "export").rename(work / "weights-only")
    go(server, folder, "export export.format=dense")
    (work / "run" / "export").rename(work / "dense")
    go(server, folder, "act-calib --only blocks act_calib.parent=ptq act_calib.epochs=0")
    go(server, folder, "export export.shard_gb=0.00006")
    (work / "run" / "export").rename(work / "sharded")
    go(server, folder, "export")
    return folder
