"""What tests of packed models share: exported toys, loaded for the compiled kernels or for torch, and their logits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import give_tables, write_recipe
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lbllm_cli.cli.app import app
from lbllm_cli.engine.abi import VARIABLE, library
from lbllm_cli.runtime.kv_cache import QuantizedKVCache
from lbllm_cli.runtime.linear import PackedLinear

# Mean difference of logits, relative to their mean size. Where no value goes over an edge between two codes it is rounding alone.
ROUNDING = 1e-5
TIPPED = 0.05


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """LBLLM_KERNELS while models are loaded."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = choice
    library.cache_clear()
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before
        library.cache_clear()


def exported(base: Path, toy: Path, act: dict | None = None, **sections) -> Path:
    """A W(1+1)A4KV4 export of a toy. act: keys of act_calib."""
    settings = {"parent": "ptq", "epochs": 0, "key_centre": "mean", **(act or {})}
    recipe = write_recipe(base / "r.yaml", toy, base / "run", act_calib=settings, **sections)
    with pytest.MonkeyPatch.context() as patch:
        give_tables(patch)
        for command in ("ptq", "act-calib", "export"):
            result = CliRunner().invoke(app, [command, "--recipe", str(recipe)], catch_exceptions=False)
            assert result.exit_code == 0, result.stderr
    return base / "run" / "export"


def load(folder: Path, choice: str = "auto", **options):
    """The model through the kernels; "off": in torch."""
    with kernels(choice):
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert packed
    assert all((module.unit is None) == (choice == "off") for module in packed)
    return model


def both(folder: Path, **options):
    return load(folder, **options), load(folder, "off", **options)


def ids(rows: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, 1024, (rows, length), generator=torch.Generator().manual_seed(seed))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().mean() / wanted.abs().mean())


def steps(model, tokens: torch.Tensor, prompt: int, cache=None) -> tuple[list[torch.Tensor], QuantizedKVCache]:
    """Logits of a prompt, then of one token at a time; and the cache."""
    first = model(tokens[:, :prompt], past_key_values=cache)
    pieces, cache = [first.logits], first.past_key_values
    for position in range(prompt, tokens.shape[1]):
        pieces.append(model(tokens[:, position : position + 1], past_key_values=cache).logits)
    return pieces, cache
