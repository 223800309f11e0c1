"""What tests of whole stages share: files and records of a stage, and runs that are stopped or refused."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from lbllm_cli.core.errors import Interrupted
from lbllm_cli.models.model import open_model
from lbllm_cli.models.stored import decoded
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.recipe.schema import Model

BLOCKS = [f"block_{i:03d}.safetensors" for i in range(3)]


def refused(lbllm, run: Path, *arguments, code: int = 2) -> str:
    """The message of a refused command; nothing but the lock may be in the output folder."""
    before = sorted(str(f) for f in run.rglob("*")) if run.exists() else []
    result = lbllm(*arguments)
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.stderr
    after = sorted(str(f) for f in run.rglob("*") if f.name != ".lock") if run.exists() else []
    assert after == [f for f in before if not f.endswith(".lock")]
    return result.stderr


def hashes(folder: Path) -> dict[str, str]:
    """Every file that the promise of equal bytes covers."""
    kept = [f for f in folder.rglob("*") if f.is_file() and f.name not in {"events.jsonl", "environment.json"}]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in kept}


def promised(folder: Path) -> dict[str, str]:
    """Hashes of what equal runs must have in common."""
    return {name: value for name, value in hashes(folder).items() if "recipe.resolved" not in name and ".png" not in name}


def block_bytes(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in BLOCKS]


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def run_in_pieces(lbllm, monkeypatch, folder: Path, *command, calls: int = 3) -> int:
    """Runs a training stage that a signal stops in every third or so call between two steps; returns how often it was stopped."""
    left = []

    def check():
        left.append(1)
        if len(left) == calls:
            raise Interrupted("stopped by SIGTERM")

    # As a training step asks, and nothing else.
    monkeypatch.setattr("lbllm_cli.training.loop.interrupt", SimpleNamespace(check=check))
    stopped = 0
    while (result := lbllm(*command)).exit_code == 130:
        assert (folder.with_name(f"{folder.name}.partial") / "training.safetensors").exists()
        left.clear()
        stopped += 1
        assert stopped < 20, result.stderr
    assert result.exit_code == 0, result.stderr
    return stopped


def stage_model(folder: Path, run: Path) -> torch.nn.Module:
    """The source model with a ptq checkpoint's weights put in by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source, checkpoint = open_model(Model(path=str(folder)), torch.device("cpu")), Checkpoint(run, "ptq")
    for index in range(source.blocks):
        for name, weight in decoded(checkpoint.read_block(index), source).items():
            model.get_parameter(name).data = weight
    return model.eval()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(1024, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits.float()
