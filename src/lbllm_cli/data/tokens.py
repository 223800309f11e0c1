"""Named text -> int64 tokens [rows, length] and their hash."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.data import sources as text_sources
from lbllm_cli.data.encode import batches, encode
from lbllm_cli.recipe.base import Source
from lbllm_cli.recipe.schema import EvaluationSet, TokenSet

# A stream from the hub has no end that could be waited for: this many times the needed tokens are read to choose from.
_OVERSAMPLE = 4
Sampler = Callable[[Source, int, int], Tensor]


def tokens_hash(tokens: Tensor) -> str:
    """sha256 of tokens as little-endian int64 with their shape: what a manifest records of its data."""
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Draw:
    """How the sequences of a set are chosen.

    key: of the recipe, for messages. sampler(source, rows, length): text sampled from the model, for `generate:`. taken: what
    other sets of the same sources and length have, and is left out; of each the sequences of sets that follow each other:
    (256, 224) are the 224 after the 256.
    """

    seed: int
    sampler: Sampler
    key: str
    taken: Sequence[tuple[int, ...]] = ()


def training_tokens(spec: TokenSet, tokenizer: Any, vocab: int, draw: Draw) -> Tensor:
    """Tokens to calibrate or train on: int64 [sequences, length].

    Each source gives its share of the sequences; non-overlapping windows of the tokenized text are drawn without
    replacement by `draw.seed`, and sources are interleaved, so that any prefix is mixed too.
    Raises UsageError when a source holds too few tokens, with the count found and needed.
    """
    length = spec.length - int(spec.bos)
    sources = text_sources.expand(spec.source)
    parts = []
    for index, (item, count) in enumerate(zip(sources, _shares(sources, spec.sequences), strict=True)):
        # By each set's own shares: those of a sum are not the sum of the shares.
        others = [[_shares(sources, size)[index] for size in sizes] for sizes in draw.taken]
        generator = torch.Generator().manual_seed(draw.seed + index)
        if not count:
            continue
        if item.sampled:
            parts.append(draw.sampler(item, count, length))
        else:
            parts.append(_windows(item, (others, count), length, tokenizer, generator, draw.key))
    order = sorted((row / part.shape[0], which, row) for which, part in enumerate(parts) for row in range(part.shape[0]))
    rows = torch.stack([parts[which][row] for _, which, row in order])
    return _finish(rows, spec.bos, tokenizer, vocab, draw.key)


def evaluation_tokens(spec: EvaluationSet, tokenizer: Any, vocab: int) -> Tensor:
    """Tokens of one evaluation set: int64 [segments, length], non-overlapping segments from the start of the text.

    Of several sources each gives its share of the segments; where no number is set, all of them follow each other.
    """
    length, key = spec.length - int(spec.bos), f"data.evaluation {spec.name}"
    sources = text_sources.expand(spec.source)
    if spec.segments is None:
        if len({item.weight for item in spec.source}) > 1:
            raise UsageError(f"{key}: weights are shares of its segments; set segments")
        ids = torch.cat([_evaluation_ids(item, tokenizer, None, key) for item in sources])
        rows = _segments(ids, max(1, ids.numel() // length), length, key, spec.source)
    else:
        counts = zip(sources, _shares(sources, spec.segments), strict=True)
        pieces = [(item, count, _evaluation_ids(item, tokenizer, count * length, key)) for item, count in counts if count]
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


def _read(batched: Iterator[Tensor], needed: int | None) -> Tensor:
    """Ids of whole batches, until `needed` are there; None: of all."""
    pieces: list[Tensor] = []
    found = 0
    for ids in batched:
        pieces.append(ids)
        found += ids.numel()
        if needed is not None and found >= needed:
            break
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def _pass_over(batched: Iterator[Tensor], others: list[list[int]]) -> int:
    """Reads past the batches that other sets read, and gives their number of tokens.

    others: of sets that follow each other, what each needs, as `_read` has it: every one begins where the one before stopped.
    """
    waiting = [[needed for needed in sets if needed] for sets in others]
    found, passed = [0] * len(waiting), 0
    while any(waiting) and (ids := next(batched, None)) is not None:
        passed += ids.numel()
        for index, sets in enumerate(waiting):
            found[index] += ids.numel()
            if sets and found[index] >= sets[0]:
                sets.pop(0)
                found[index] = 0
    return passed


def _pretokenized(item: Source, length: int | None) -> Tensor:
    """`input_ids` of a safetensors file: [n], or [rows, length] taken row by row."""
    path = files.user_path(item.source, "source")
    files.check_regular(path)
    try:
        with safe_open(path, framework="pt") as handle:
            names = list(handle.keys())
            ids = handle.get_tensor("input_ids") if "input_ids" in names else None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if ids is None or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        kinds = "" if ids is None else f" (input_ids are {str(ids.dtype).removeprefix('torch.')})"
        raise UsageError(f"{path}: expected an integer tensor `input_ids`, it has: {', '.join(names)[:300]}{kinds}")
    if ids.dim() not in {1, 2}:
        raise UsageError(f"{path}: input_ids have the shape {list(ids.shape)}, expected [tokens] or [rows, tokens]")
    ids = ids.long()
    if ids.dim() == 2 and length is not None and ids.shape[1] < length:
        raise UsageError(f"{path}: rows of input_ids have {ids.shape[1]} tokens, {length} are needed")
    return ids[:, :length].flatten() if ids.dim() == 2 else ids


def _windows(
    item: Source, wanted: tuple[list[list[int]], int], length: int, tokenizer: Any, generator: torch.Generator, key: str
) -> Tensor:
    """int64 [count, length]. wanted: of sets that follow each other, the sequences that each has of this source; the count."""
    others, count = wanted
    where, skip = f"{key}: {text_sources.describe(item)}", max(map(sum, others), default=0)
    preset = text_sources.PRESETS.get(item.source)
    passed = 0
    if item.source.endswith(".safetensors"):
        ids = _pretokenized(item, length)
    elif preset is not None and preset.joiner is None:
        return _record_windows(item, (skip, count), length, tokenizer, generator, where)
    else:
        texts = text_sources.documents(item, False, tokenizer)
        if preset is not None:
            texts = iter([str(preset.joiner).join(texts)])
        elif not item.messages_key:
            texts = (text + "\n\n" for text in texts)
        batched = batches(texts, tokenizer, where)
        if item.source.startswith("hub:"):
            # All that another set chose from is passed over: to the end of the batch where it had enough.
            passed = _pass_over(batched, [[_OVERSAMPLE * size * length for size in sets] for sets in others])
            ids = _read(batched, _OVERSAMPLE * count * length)
            skip = 0
        else:
            ids = _read(batched, None)
    found, needed = ids.numel() // length, skip + count
    if found < needed:
        after = f" after the {passed:,} that another set reads" if passed else ""
        raise UsageError(
            f"{where} holds {ids.numel():,} tokens{after}, {needed * length:,} are needed "
            f"({count}{f' beside the {skip} of another set' if skip else ''} sequences x {length}); lower sequences or length, "
            "or add text"
        )
    chosen = torch.randperm(found, generator=generator)[skip:needed]
    return ids[: found * length].view(found, length)[chosen]


def _record_windows(
    item: Source, counts: tuple[int, int], length: int, tokenizer: Any, generator: torch.Generator, where: str
) -> Tensor:
    """A random window of each record that is longer than a sequence, records in a random order within a pool.

    counts: sequences of other sets, whose pools come first and are passed over, and to take.
    """
    passed, count = _OVERSAMPLE * counts[0], counts[1]
    pool: list[Tensor] = []
    found = 0
    for text in text_sources.documents(item, False, tokenizer):
        ids = encode(text, tokenizer, where)
        if ids.numel() > length:
            found += 1
            if found > passed:
                pool.append(ids)
        if len(pool) == _OVERSAMPLE * count:
            break
    if len(pool) < count:
        after = f", the first {min(found, passed):,} of them for another set" if passed else ""
        raise UsageError(
            f"{where} holds {found:,} records of more than {length} tokens{after}, "
            f"{count} are needed; lower sequences or length, or add text"
        )
    rows = []
    for index in torch.randperm(len(pool), generator=generator)[:count].tolist():
        start = int(torch.randint(0, pool[index].numel() - length, (1,), generator=generator))
        rows.append(pool[index][start : start + length])
    return torch.stack(rows)


def _evaluation_ids(item: Source, tokenizer: Any, needed: int | None, key: str) -> Tensor:
    if item.source.endswith(".safetensors"):
        return _pretokenized(item, None)
    where = f"{key}: {text_sources.describe(item)}"
    texts = text_sources.documents(item, True, tokenizer)
    preset = text_sources.PRESETS.get(item.source)
    if preset is not None:
        joined = preset.evaluation_joiner.join(islice(texts, preset.evaluation_records))
        return encode(joined, tokenizer, where, needed)[: preset.evaluation_tokens]
    return _read(batches((text + "\n\n" for text in texts), tokenizer, where, needed), needed)


def _finish(rows: Tensor, bos: bool, tokenizer: Any, vocab: int, where: str) -> Tensor:
    if bos:
        if tokenizer.bos_token_id is None:
            raise UsageError(f"{where}: bos is true and the tokenizer has no BOS token; set bos: false")
        rows = torch.cat([torch.full((rows.shape[0], 1), tokenizer.bos_token_id, dtype=torch.int64), rows], dim=1)
    least, most = int(rows.min()), int(rows.max())
    if least < 0:
        raise UsageError(f"{where}: token ids begin at {least}, the vocabulary at 0; wrong tokenizer?")
    if most >= vocab:
        raise UsageError(f"{where}: token ids reach {most}, the vocabulary ends at {vocab - 1}; wrong tokenizer?")
    return rows.contiguous()
