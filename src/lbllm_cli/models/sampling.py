"""Text sampled from a full-precision model that is whole in memory: calibration text for `generate:` sources."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.console import clock
from lbllm_cli.core.errors import UsageError
from lbllm_cli.models.model import SourceModel
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


class Listener(Protocol):
    """Who is told how far sampling is: it may take hours."""

    def tick(self, text: str) -> None:
        """At every token."""

    def note(self, text: str) -> None:
        """A line now and then."""


class Silent:
    """Tells nobody."""

    def tick(self, text: str) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def sample_tokens(model: SourceModel, tokenizer: Any, wanted: Sampling, kept: Path, listener: Listener) -> Tensor:
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
    pieces, seconds = [], []
    for start in range(0, wanted.rows, ROWS_AT_ONCE):
        count, path = min(ROWS_AT_ONCE, wanted.rows - start), kept / f"{start:08d}.safetensors"
        if path.exists():
            tensors = _kept(path, (count, wanted.length), int(model.config.vocab_size))
            try:
                generator.set_state(tensors[_STATE])
            except (KeyError, RuntimeError, TypeError):
                raise UsageError(f"{path} is damaged (expected a generator's state); delete it: it is sampled again") from None
        else:
            began, where = time.monotonic(), f"sampling sequences {start + 1} to {start + count} of {wanted.rows}"
            told = partial(_tick, listener, where, wanted.length)
            tokens = _sample(network, model, tokenizer, (count, wanted), generator, told)
            tensors = {_TOKENS: tokens, _STATE: generator.get_state()}
            files.write_atomic(path, partial(save_file, tensors))
            seconds.append(time.monotonic() - began)
            _note(listener, start + count, wanted.rows, sum(seconds) / len(seconds))
        pieces.append(tensors[_TOKENS])
    return torch.cat(pieces)


def _tick(listener: Listener, where: str, length: int, token: int) -> None:
    listener.tick(f"{where}, token {token}/{length}")


def _note(listener: Listener, done: int, rows: int, seconds: float) -> None:
    """seconds: of ROWS_AT_ONCE sequences, mean."""
    left = f"  eta {clock((rows - done) / ROWS_AT_ONCE * seconds)}" if done < rows else ""
    listener.note(f"{done} of {rows} sequences are sampled{left}")


def _sample(
    network: Any, model: SourceModel, tokenizer: Any, wanted: tuple[int, Sampling], generator: torch.Generator,
    told: Callable[[int], None],
) -> Tensor:  # fmt: skip
    """Sequences that are sampled together: int64 [count, length]. told: before each token its number, from 1."""
    count, settings = wanted
    if tokenizer.bos_token_id is not None:
        token = torch.full((count, 1), tokenizer.bos_token_id, device=model.device)
    else:
        token = torch.randint(int(model.config.vocab_size), (count, 1), generator=generator, device=model.device)
    name, cache, sampled = Arguments(network).name, DynamicCache(config=network.config), []
    for number in range(settings.length):
        interrupt.check()
        told(number + 1)
        out = network(token, use_cache=True, **{name: cache})
        chances = torch.softmax(out.logits[:, -1].float() / settings.temperature, dim=-1)
        token = torch.multinomial(chances, 1, generator=generator)
        sampled.append(token.cpu())
    return torch.cat(sampled, dim=1)


def cached_sample(model: SourceModel, tokenizer: Any, output: Path, wanted: Sampling, listener: Listener) -> Tensor:
    """`sample_tokens`, kept in <output>/generated/."""
    path = _place(model, output, wanted)
    kept = path.with_suffix(".partial")
    if not path.exists():
        tokens = sample_tokens(model, tokenizer, wanted, kept, listener)
        files.write_atomic(path, partial(save_file, {_TOKENS: tokens}))
    # Also what a kill has left beside the whole.
    shutil.rmtree(kept, ignore_errors=True)
    return _kept(path, (wanted.rows, wanted.length), int(model.config.vocab_size))[_TOKENS]


def kept_sample(model: SourceModel, output: Path, wanted: Sampling) -> Tensor | None:
    """What `cached_sample` has kept, None where it has yet to be sampled; nothing is written."""
    path = _place(model, output, wanted)
    return _kept(path, (wanted.rows, wanted.length), int(model.config.vocab_size))[_TOKENS] if path.exists() else None


def _place(model: SourceModel, output: Path, wanted: Sampling) -> Path:
    """The file of sampled text: its name covers everything that the text depends on."""
    what = f"{model.identity()} {wanted.rows} {wanted.length} {wanted.seed} {wanted.temperature} {model.dtype}"
    return output / "generated" / f"{sha256(what.encode()).hexdigest()[:16]}.safetensors"


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
