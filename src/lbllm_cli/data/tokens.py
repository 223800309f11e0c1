"""Named text -> int64 tokens [rows, length] and their hash."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lbllm_cli.core.errors import UsageError
from lbllm_cli.data import sources as text_sources
from lbllm_cli.data.encode import batches, encode
from lbllm_cli.data.presets import PRESETS
from lbllm_cli.data.repeats import with_repeats
from lbllm_cli.data.windows import Wanted, pretokenized, read, windows
from lbllm_cli.recipe.text import EvaluationSet, Source, TokenSet

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
    other sets of that length have of the same texts, and is left out: of each the sets that follow each other, with their sources
    and sequences; [(a, 256), (b, 224)] are the 224 of b behind what the 256 of a have. before: sources of all these sets, the
    first one first: the order of a text's windows is that which it had in the first that has it.
    """

    seed: int
    sampler: Sampler
    key: str
    taken: Sequence[Sequence[tuple[list[Source], int]]] = ()
    before: Sequence[Sequence[Source]] = ()


def training_tokens(spec: TokenSet, tokenizer: Any, vocab: int, draw: Draw) -> Tensor:
    """Tokens to calibrate or train on: int64 [sequences, length].

    Each source gives its share of the sequences; non-overlapping windows of the tokenized text are drawn without
    replacement by `draw.seed`, and sources are interleaved, so that any prefix is mixed too.
    Raises UsageError when a source holds too few tokens, with the count found and needed.
    """
    sources = text_sources.expand(spec.source)
    drawn = _drawn(sources, spec.sequences, spec.length - int(spec.bos), tokenizer, draw)
    parts = [
        with_repeats(drawn[index], item.repeats, draw.seed + index) if item.repeats else drawn[index]
        for index, item in enumerate(sources)
        if index in drawn
    ]
    order = sorted((row / part.shape[0], which, row) for which, part in enumerate(parts) for row in range(part.shape[0]))
    rows = torch.stack([parts[which][row] for _, which, row in order])
    with text_sources.named(draw.key):
        return _finish(rows, spec.bos, tokenizer, vocab)


def _drawn(sources: list[Source], sequences: int, length: int, tokenizer: Any, draw: Draw) -> dict[int, Tensor]:
    """Sequences of each source that has any, by its number. Of a text that is named twice, or beside a mixture that has it, all
    are drawn at once: no two are the same windows.
    """
    shares = _shares(sources, sequences)
    numbers: dict[Source, int] = {}
    for listed in (*draw.before, sources):
        for text, own in _texts(text_sources.expand(list(listed))).items():
            numbers.setdefault(text, own[0])
    found: dict[int, Tensor] = {}
    # Sampling takes hours: what the others lack is found before.
    for item, own in sorted(_texts(sources).items(), key=lambda text: text[0].sampled):
        counts = {index: shares[index] for index in own if shares[index]}
        if not counts:
            continue
        if item.sampled:
            rows = draw.sampler(sources[own[0]], sum(counts.values()), length)
        else:
            # By each set's own shares: those of a sum are not the sum of the shares.
            counted = ([_count(item, those, size) for those, size in sets] for sets in draw.taken)
            others = [taken for sizes in counted if (taken := [size for size in sizes if size])]
            wanted = Wanted(sum(counts.values()), length, others, draw.seed + numbers[item])
            with text_sources.named(draw.key):
                rows = windows(item, wanted, tokenizer)
        found |= dict(zip(counts, rows.split(list(counts.values())), strict=True))
    return found


def _texts(sources: list[Source]) -> dict[Source, list[int]]:
    """The texts that sources name, and by which of them: what is done to windows afterwards makes no other text."""
    texts: dict[Source, list[int]] = {}
    for index, item in enumerate(sources):
        texts.setdefault(item.model_copy(update={"weight": 1.0, "repeats": 0.0}), []).append(index)
    return texts


def _count(text: Source, sources: list[Source], total: int) -> int:
    """Sequences of a text in a set of `total` of some sources."""
    expanded = text_sources.expand(sources)
    shares = _shares(expanded, total)
    return sum(shares[index] for index in _texts(expanded).get(text, ()))


def evaluation_tokens(spec: EvaluationSet, tokenizer: Any, vocab: int) -> Tensor:
    """Tokens of one evaluation set: int64 [segments, length], non-overlapping segments from the start of the text.

    Of several sources each gives its share of the segments; where no number is set, all of them follow each other.
    """
    length, sources = spec.length - int(spec.bos), text_sources.expand(spec.source)
    with text_sources.named(spec.key):
        if spec.segments is None:
            if len({item.weight for item in spec.source}) > 1:
                raise UsageError("weights are shares of its segments; set segments")
            ids = torch.cat([_evaluation_ids(item, tokenizer, None) for item in sources])
            rows = _segments(ids, max(1, ids.numel() // length), length, spec.source)
        else:
            counts = zip(sources, _shares(sources, spec.segments), strict=True)
            pieces = [(item, count, _evaluation_ids(item, tokenizer, count * length)) for item, count in counts if count]
            rows = torch.cat([_segments(ids, count, length, [item]) for item, count, ids in pieces])
        return _finish(rows, spec.bos, tokenizer, vocab)


def _segments(ids: Tensor, count: int, length: int, sources: list[Source]) -> Tensor:
    """The first `count` segments: int64 [n] -> [count, length]. sources: for messages."""
    if count * length > ids.numel():
        names = ", ".join(text_sources.describe(item) for item in sources)
        raise UsageError(
            f"{names} holds {ids.numel():,} tokens, {count * length:,} are needed ({count} segments x {length}); "
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


def _evaluation_ids(item: Source, tokenizer: Any, needed: int | None) -> Tensor:
    if item.source.endswith(".safetensors"):
        return pretokenized(item, None)
    where = text_sources.describe(item)
    texts = text_sources.documents(item, True, tokenizer)
    preset = PRESETS.get(item.source)
    if preset is not None:
        joined = preset.evaluation_joiner.join(islice(texts, preset.evaluation_records))
        return encode(joined, tokenizer, where, needed)[: preset.evaluation_tokens]
    return read(batches(text_sources.parted(item, texts), tokenizer, where, needed), needed)


def _finish(rows: Tensor, bos: bool, tokenizer: Any, vocab: int) -> Tensor:
    if bos:
        if tokenizer.bos_token_id is None:
            raise UsageError("bos is true and the tokenizer has no BOS token; set bos: false")
        rows = torch.cat([torch.full((rows.shape[0], 1), tokenizer.bos_token_id, dtype=torch.int64), rows], dim=1)
    least, most = int(rows.min()), int(rows.max())
    if least < 0:
        raise UsageError(f"token ids begin at {least}, the vocabulary at 0; wrong tokenizer?")
    if most >= vocab:
        raise UsageError(f"token ids reach {most}, the vocabulary ends at {vocab - 1}; wrong tokenizer?")
    return rows.contiguous()
