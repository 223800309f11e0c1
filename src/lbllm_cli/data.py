"""Named text -> int64 tokens [rows, length] and their hash."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lbllm_cli import text_sources
from lbllm_cli.errors import UsageError
from lbllm_cli.recipe import EvaluationSet, TokenSet
from lbllm_cli.recipe_base import Source

# A stream from the hub has no end that could be waited for: this many times the needed tokens are read to choose from.
_OVERSAMPLE = 4
_BATCH = 256
Sampler = Callable[[Source, int, int], Tensor]


def tokens_hash(tokens: Tensor) -> str:
    """sha256 of tokens as little-endian int64 with their shape: what a manifest records of its data."""
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def training_tokens(
    spec: TokenSet,
    tokenizer: Any,
    vocab: int,
    seed: int,
    sampler: Sampler,
    key: str,
    taken: Sequence[tuple[int, ...]] = (),
) -> Tensor:
    """Tokens to calibrate or train on: int64 [sequences, length]. key: of the recipe, for messages.

    Each source gives its share of the sequences; non-overlapping windows of the tokenized text are drawn without
    replacement by `seed`, and sources are interleaved, so that any prefix is mixed too.
    sampler(source, rows, length): text sampled from the model, for `generate:`. taken: what other sets of the same sources and
    length have, and is left out; of each the sequences of sets that follow each other: (256, 224) are the 224 after the 256.
    Raises UsageError when a source holds too few tokens, with the count found and needed.
    """
    length = spec.length - int(spec.bos)
    sources = text_sources.expand(spec.source)
    parts = []
    for index, (item, count) in enumerate(zip(sources, _shares(sources, spec.sequences), strict=True)):
        # By each set's own shares: those of a sum are not the sum of the shares.
        before = max((sum(_shares(sources, size)[index] for size in sizes) for sizes in taken), default=0)
        generator = torch.Generator().manual_seed(seed + index)
        if not count:
            continue
        if item.source == "generate:":
            parts.append(sampler(item, count, length))
        else:
            parts.append(_windows(item, (before, count), length, tokenizer, generator, key))
    order = sorted((row / part.shape[0], which, row) for which, part in enumerate(parts) for row in range(part.shape[0]))
    rows = torch.stack([parts[which][row] for _, which, row in order])
    return _finish(rows, spec.bos, tokenizer, vocab, key)


def evaluation_tokens(spec: EvaluationSet, tokenizer: Any, vocab: int) -> Tensor:
    """Tokens of one evaluation set: int64 [segments, length], non-overlapping segments from the start of the text.

    Of several sources each gives its share of the segments; where no number is set, all of them follow each other.
    """
    length, key = spec.length - int(spec.bos), f"data.evaluation {spec.name}"
    sources = text_sources.expand(spec.source)
    if spec.segments is None:
        if len({item.weight for item in spec.source}) > 1:
            raise UsageError(f"{key}: weights are shares of its segments; set segments")
        ids = torch.cat([_evaluation_ids(item, tokenizer, None) for item in sources])
        rows = _segments(ids, max(1, ids.numel() // length), length, key, spec.source)
    else:
        counts = zip(sources, _shares(sources, spec.segments), strict=True)
        pieces = [(item, count, _evaluation_ids(item, tokenizer, count * length)) for item, count in counts if count]
        rows = torch.cat([_segments(ids, count, length, key, [item]) for item, count, ids in pieces])
    return _finish(rows, spec.bos, tokenizer, vocab, key)


def _segments(ids: Tensor, count: int, length: int, key: str, sources: list[Source]) -> Tensor:
    """The first `count` segments: int64 [n] -> [count, length]. key, sources: for messages."""
    if count * length > ids.numel():
        names = ", ".join(text_sources.describe(item) for item in sources)
        raise UsageError(
            f"{key}: {names} holds {ids.numel():,} tokens, {count * length:,} are needed ({count} segments x {length}); "
            "lower segments or length"
        )
    return ids[: count * length].view(count, length)


def _shares(sources: list[Source], total: int) -> list[int]:
    """Largest remainders: counts that add up to `total`, in proportion to the weights."""
    whole = sum(item.weight for item in sources)
    exact = [total * item.weight / whole for item in sources]
    counts = [int(value) for value in exact]
    for index in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _encode(texts: Iterator[str], tokenizer: Any, needed: int | None) -> Tensor:
    """Token ids of texts, each followed by nothing; reading stops once `needed` tokens are there."""
    pieces: list[Tensor] = []
    found = 0
    while batch := list(islice(texts, _BATCH)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(torch.tensor(ids, dtype=torch.int64))
            found += len(ids)
        if needed is not None and found >= needed:
            break
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def _pretokenized(path: Path, length: int | None) -> Tensor:
    """`input_ids` of a safetensors file: [n], or [rows, length] taken row by row."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if "input_ids" not in tensors or tensors["input_ids"].is_floating_point():
        raise UsageError(f"{path}: expected an integer tensor `input_ids`, it has: {', '.join(tensors)}")
    ids = tensors["input_ids"].long()
    if ids.dim() == 2 and length is not None and ids.shape[1] < length:
        raise UsageError(f"{path}: rows of input_ids have {ids.shape[1]} tokens, {length} are needed")
    return ids[:, :length].flatten() if ids.dim() == 2 else ids.flatten()


def _windows(item: Source, counts: tuple[int, int], length: int, tokenizer: Any, generator: torch.Generator, key: str) -> Tensor:
    """counts: sequences to leave out, and to take."""
    skip, count = counts
    preset = text_sources.PRESETS.get(item.source)
    if item.source.endswith(".safetensors"):
        ids = _pretokenized(Path(item.source).expanduser(), length)
    elif preset is not None and preset.joiner is None:
        return _record_windows(item, counts, length, tokenizer, generator, key)
    else:
        texts = text_sources.documents(item, False, tokenizer)
        if preset is not None:
            texts = iter([str(preset.joiner).join(texts)])
        elif not item.messages_key:
            texts = (text + "\n\n" for text in texts)
        if item.source.startswith("hub:"):
            # What the other set chose from is passed over.
            ids = _encode(texts, tokenizer, _OVERSAMPLE * (skip + count) * length)[_OVERSAMPLE * skip * length :]
            skip = 0
        else:
            ids = _encode(texts, tokenizer, None)
    found, needed = ids.numel() // length, skip + count
    if found < needed:
        raise UsageError(
            f"{key}: {text_sources.describe(item)} holds {ids.numel():,} tokens, {needed * length:,} are needed "
            f"({count}{f' beside the {skip} of another set' if skip else ''} sequences x {length}); lower sequences or length, "
            "or add text"
        )
    chosen = torch.randperm(found, generator=generator)[skip:needed]
    return ids[: found * length].view(found, length)[chosen]


def _record_windows(
    item: Source, counts: tuple[int, int], length: int, tokenizer: Any, generator: torch.Generator, key: str
) -> Tensor:
    """A random window of each record that is longer than a sequence, records in a random order within a pool."""
    skip, count = counts
    pool: list[Tensor] = []
    texts = text_sources.documents(item, False, tokenizer)
    for text in texts:
        ids = _encode(iter([text]), tokenizer, None)
        if ids.numel() > length:
            pool.append(ids)
        if len(pool) == _OVERSAMPLE * (skip + count):
            break
    pool = pool[_OVERSAMPLE * skip :]
    if len(pool) < count:
        raise UsageError(
            f"{key}: {text_sources.describe(item)} holds {len(pool)} records of more than {length} tokens, "
            f"{count} are needed; lower sequences or length"
        )
    rows = []
    for index in torch.randperm(len(pool), generator=generator)[:count].tolist():
        start = int(torch.randint(0, pool[index].numel() - length, (1,), generator=generator))
        rows.append(pool[index][start : start + length])
    return torch.stack(rows)


def _evaluation_ids(item: Source, tokenizer: Any, needed: int | None) -> Tensor:
    if item.source.endswith(".safetensors"):
        return _pretokenized(Path(item.source).expanduser(), None)
    texts = text_sources.documents(item, True, tokenizer)
    preset = text_sources.PRESETS.get(item.source)
    if preset is not None:
        joined = preset.evaluation_joiner.join(islice(texts, preset.evaluation_records))
        return _encode(iter([joined]), tokenizer, None)[: preset.evaluation_tokens]
    return _encode((text + "\n\n" for text in texts), tokenizer, needed)


def _finish(rows: Tensor, bos: bool, tokenizer: Any, vocab: int, where: str) -> Tensor:
    if int(rows.max()) >= vocab or int(rows.min()) < 0:
        raise UsageError(f"{where}: token ids reach {int(rows.max())}, the vocabulary ends at {vocab - 1}; wrong tokenizer?")
    if bos:
        if tokenizer.bos_token_id is None:
            raise UsageError(f"{where}: bos is true and the tokenizer has no BOS token; set bos: false")
        rows = torch.cat([torch.full((rows.shape[0], 1), tokenizer.bos_token_id, dtype=torch.int64), rows], dim=1)
    return rows.contiguous()
