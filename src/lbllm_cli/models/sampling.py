"""Text sampled from a full-precision model that is whole in memory: calibration text for `generate:` sources."""

import shutil
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.errors import UsageError
from lbllm_cli.models.model import SourceModel
from lbllm_cli.recipe.base import Source
from lbllm_cli.runtime.attachments import Arguments

# Sequences sampled together: their keys and values lie in memory beside the whole model.
ROWS_AT_ONCE = 32
_TOKENS, _STATE = "input_ids", "generator"


@dataclass(frozen=True)
class Sampling:
    """What is sampled: int64 [rows, length] tokens, without the start token."""

    rows: int
    length: int
    seed: int
    temperature: float


def sample_tokens(model: SourceModel, tokenizer: Any, wanted: Sampling, kept: Path) -> Tensor:
    """Samples text from the model itself: int64 [rows, length], without the start token.

    Starts from the tokenizer's BOS, or where it has none from single tokens drawn at random. Needs the whole model in memory.
    kept: folder of what has been sampled, ROWS_AT_ONCE sequences a file with the generator's state behind them. What is there
    already is not sampled again, and what follows has the bytes that it would have had. Raises UsageError for a damaged file.
    """
    from lbllm_cli.models.whole_folder import load_folder  # a CPU second, of which forecasts need nothing

    # A family's own classes are always there, whatever code the folder brings.
    network = load_folder(model.folder, model.config, False, dtype=model.dtype).to(model.device)
    generator = torch.Generator(device=model.device).manual_seed(wanted.seed)
    kept.mkdir(parents=True, exist_ok=True)
    pieces = []
    for start in range(0, wanted.rows, ROWS_AT_ONCE):
        count, path = min(ROWS_AT_ONCE, wanted.rows - start), kept / f"{start:08d}.safetensors"
        if path.exists():
            tensors = _kept(path, (count, wanted.length), int(model.config.vocab_size))
            try:
                generator.set_state(tensors[_STATE])
            except (KeyError, RuntimeError, TypeError):
                raise UsageError(f"{path} is damaged (expected a generator's state); delete it: it is sampled again") from None
        else:
            tokens = _sample(network, model, tokenizer, (count, wanted), generator)
            tensors = {_TOKENS: tokens, _STATE: generator.get_state()}
            files.write_atomic(path, partial(save_file, tensors))
        pieces.append(tensors[_TOKENS])
    return torch.cat(pieces)


def _sample(network: Any, model: SourceModel, tokenizer: Any, wanted: tuple[int, Sampling], generator: torch.Generator) -> Tensor:
    """Sequences that are sampled together: int64 [count, length]."""
    count, settings = wanted
    if tokenizer.bos_token_id is not None:
        token = torch.full((count, 1), tokenizer.bos_token_id, device=model.device)
    else:
        token = torch.randint(int(model.config.vocab_size), (count, 1), generator=generator, device=model.device)
    name, cache, sampled = Arguments(network).name, DynamicCache(config=network.config), []
    for _ in range(settings.length):
        interrupt.check()
        out = network(token, use_cache=True, **{name: cache})
        chances = torch.softmax(out.logits[:, -1].float() / settings.temperature, dim=-1)
        token = torch.multinomial(chances, 1, generator=generator)
        sampled.append(token.cpu())
    return torch.cat(sampled, dim=1)


def cached_sample(model: SourceModel, tokenizer: Any, output: Path, item: Source, shape: tuple[int, int], seed: int) -> Tensor:
    """`sample_tokens` of a shape, kept in <output>/generated/ under a name that covers everything it depends on."""
    rows, length = shape
    key = sha256(f"{model.identity()} {rows} {length} {seed} {item.temperature} {model.dtype}".encode()).hexdigest()[:16]
    path = output / "generated" / f"{key}.safetensors"
    kept = path.with_suffix(".partial")
    if not path.exists():
        tokens = sample_tokens(model, tokenizer, Sampling(rows, length, seed, item.temperature), kept)
        files.write_atomic(path, partial(save_file, {_TOKENS: tokens}))
    # Also what a kill has left beside the whole.
    shutil.rmtree(kept, ignore_errors=True)
    return _kept(path, shape, int(model.config.vocab_size))[_TOKENS]


def _kept(path: Path, shape: tuple[int, int], vocab: int) -> dict[str, Tensor]:
    """A file of text that was sampled before. Raises UsageError where it is not what the file's name says."""
    files.check_regular(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged ({error}); delete it: it is sampled again") from None
    tokens = tensors.get(_TOKENS)
    usable = tokens is not None and tokens.dtype == torch.int64 and tokens.shape == shape
    if tokens is None or not usable or not bool(((tokens >= 0) & (tokens < vocab)).all()):
        expected = f"{_TOKENS} {list(shape)} of token numbers below {vocab}"
        raise UsageError(f"{path} is damaged (expected {expected}); delete it: it is sampled again")
    return tensors
