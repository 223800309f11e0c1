"""Text sampled from a full-precision model that is whole in memory: calibration text for `generate:` sources."""

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
from lbllm_cli.models.whole_folder import load_folder
from lbllm_cli.recipe.base import Source
from lbllm_cli.runtime.attachments import Arguments

# Sequences sampled together: their keys and values lie in memory beside the whole model.
ROWS_AT_ONCE = 32


def sample_tokens(model: SourceModel, tokenizer: Any, rows: int, length: int, seed: int, temperature: float) -> Tensor:
    """Samples text from the model itself: int64 [rows, length], without the start token.

    Starts from the tokenizer's BOS, or where it has none from single tokens drawn at random. Needs the whole model in memory.
    """
    # A family's own classes are always there, whatever code the folder brings.
    network = load_folder(model.folder, model.config, False, dtype=model.dtype).to(model.device)
    name = Arguments(network).name
    generator = torch.Generator(device=model.device).manual_seed(seed)
    pieces = []
    for start in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - start)
        if tokenizer.bos_token_id is not None:
            token = torch.full((count, 1), tokenizer.bos_token_id, device=model.device)
        else:
            vocab = int(model.config.vocab_size)
            token = torch.randint(vocab, (count, 1), generator=generator, device=model.device)
        cache, sampled = DynamicCache(config=network.config), []
        for _ in range(length):
            interrupt.check()
            out = network(token, use_cache=True, **{name: cache})
            chances = torch.softmax(out.logits[:, -1].float() / temperature, dim=-1)
            token = torch.multinomial(chances, 1, generator=generator)
            sampled.append(token.cpu())
        pieces.append(torch.cat(sampled, dim=1))
    return torch.cat(pieces)


def cached_sample(model: SourceModel, tokenizer: Any, output: Path, item: Source, shape: tuple[int, int], seed: int) -> Tensor:
    """`sample_tokens` of a shape, kept in <output>/generated/ under a name that covers everything it depends on."""
    rows, length = shape
    key = sha256(f"{model.identity()} {rows} {length} {seed} {item.temperature} {model.dtype}".encode()).hexdigest()[:16]
    path = output / "generated" / f"{key}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens = sample_tokens(model, tokenizer, rows, length, seed, item.temperature)
        files.write_atomic(path, lambda temporary: save_file({"input_ids": tokens}, temporary))
    return _sampled(path, shape, int(model.config.vocab_size))


def _sampled(path: Path, shape: tuple[int, int], vocab: int) -> Tensor:
    """Text that was sampled before. Raises UsageError where it is not what the file's name says."""
    files.check_regular(path)
    try:
        tokens = load_file(path).get("input_ids")
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged ({error}); delete it: it is sampled again") from None
    usable = tokens is not None and tokens.dtype == torch.int64 and tokens.shape == shape
    if tokens is None or not usable or not bool(((tokens >= 0) & (tokens < vocab)).all()):
        expected = f"input_ids {list(shape)} of token numbers below {vocab}"
        raise UsageError(f"{path} is damaged (expected {expected}); delete it: it is sampled again")
    return tokens
