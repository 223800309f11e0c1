"""Windows of a source's text that a set of sequences holds, and that no set before it holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.data import sources as text_sources
from lbllm_cli.data.encode import batches, encode
from lbllm_cli.data.presets import PRESETS
from lbllm_cli.recipe.text import Source

# A stream from the hub has no end that could be waited for: this many times the needed tokens are read to choose from.
OVERSAMPLE = 4
# Texts as they were encoded by a tokenizer, for as long as that is there: two seconds for the bundled one, of every stage. Larger
# ones are read again.
_KEPT: "WeakKeyDictionary[Any, dict[Source, Tensor]]" = WeakKeyDictionary()
_KEPT_MOST = 1 << 24


@dataclass(frozen=True)
class Wanted:
    """What is drawn of one source.

    count: sequences. others: sets that come before and follow each other, the sequences that each has of this source: [256, 224]
    are the 224 after the 256. seed: of the choice, the same for all of these sets.
    """

    count: int
    length: int
    others: Sequence[Sequence[int]]
    seed: int

    def order(self, number: int) -> Tensor:
        """The order in which `number` windows are taken: int64 [number]."""
        return torch.randperm(number, generator=torch.Generator().manual_seed(self.seed))


def windows(item: Source, wanted: Wanted, tokenizer: Any) -> Tensor:
    """Windows that no other set has: int64 [count, length].

    Raises UsageError when the source holds too few, with the count found and needed.
    """
    preset = PRESETS.get(item.source)
    if item.source.endswith(".safetensors"):
        return _of_all(pretokenized(item, wanted.length), item, wanted)
    if preset is not None and preset.within_records:
        return _within_records(item, wanted, tokenizer)
    if item.source.startswith("hub:") or (preset is not None and preset.messages_key and not item.path):
        return _of_stream(item, wanted, tokenizer)
    if preset is not None and preset.joiner:
        texts = iter([preset.joiner.join(text_sources.documents(item, False, tokenizer))])
        return _of_all(read(batches(texts, tokenizer, text_sources.describe(item)), None), item, wanted)
    return _of_all(_whole(item, wanted, tokenizer), item, wanted)


def _whole(item: Source, wanted: Wanted, tokenizer: Any) -> Tensor:
    """Ids of a whole text, int64 [n]. Stages of a run, and sets that follow each other, read the same one."""
    kept = _KEPT.setdefault(tokenizer, {})
    if (found := kept.get(item)) is None:
        found = read(_batched(item, tokenizer), None)
        if found.numel() <= _KEPT_MOST:
            kept[item] = found
    return found


def read(batched: Iterator[Tensor], needed: int | None) -> Tensor:
    """Ids of whole batches, until `needed` are there; None: of all. int64 [n]."""
    pieces: list[Tensor] = []
    found = 0
    for ids in batched:
        pieces.append(ids)
        found += ids.numel()
        if needed is not None and found >= needed:
            break
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def pretokenized(item: Source, length: int | None) -> Tensor:
    """`input_ids` of a safetensors file: int64 [n], of rows the first `length` of each, one after the other.

    Raises UsageError when the file holds none, or rows that are too short.
    """
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


def _batched(item: Source, tokenizer: Any) -> Iterator[Tensor]:
    """Ids of a source, 256 records at a time."""
    texts = text_sources.parted(item, text_sources.documents(item, False, tokenizer))
    return batches(texts, tokenizer, text_sources.describe(item))


def _of_all(ids: Tensor, item: Source, wanted: Wanted) -> Tensor:
    """Of a text that is there as a whole: int64 [n] -> [count, length]."""
    skip = max(map(sum, wanted.others), default=0)
    found, needed = ids.numel() // wanted.length, skip + wanted.count
    if found < needed:
        raise UsageError(
            f"{text_sources.describe(item)} holds {ids.numel():,} tokens, {needed * wanted.length:,} are needed "
            f"({wanted.count}{f' beside the {skip} of another set' if skip else ''} sequences x {wanted.length}); "
            "lower sequences or length, or add text"
        )
    return ids[: found * wanted.length].view(found, wanted.length)[wanted.order(found)[skip:needed]]


def _of_stream(item: Source, wanted: Wanted, tokenizer: Any) -> Tensor:
    """Of the part of a stream that follows the parts which other sets chose from; of a short one, of what they left."""
    batched = _batched(item, tokenizer)
    _pass_over(batched, [[OVERSAMPLE * size * wanted.length for size in sets] for sets in wanted.others])
    ids = read(batched, OVERSAMPLE * wanted.count * wanted.length)
    found = ids.numel() // wanted.length
    if found >= wanted.count:
        return ids[: found * wanted.length].view(found, wanted.length)[wanted.order(found)[: wanted.count]]
    # The stream has ended, and what it holds can be kept.
    pieces = list(_batched(item, tokenizer))
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *pieces])
    left, others = _left(list(accumulate(piece.numel() for piece in pieces)), wanted, wanted.length)
    if len(left) < wanted.count:
        beside = f", {others} sequences of it are of other sets and {len(left)} more are left" if others else ""
        raise UsageError(
            f"{text_sources.describe(item)} holds {ids.numel():,} tokens{beside}, {wanted.count * wanted.length:,} are needed "
            f"({wanted.count} sequences x {wanted.length}); lower sequences or length, or add text"
        )
    chosen = torch.tensor(left)[wanted.order(len(left))[: wanted.count]]
    return ids[chosen[:, None] + torch.arange(wanted.length)]


def _pass_over(batched: Iterator[Tensor], others: Sequence[Sequence[int]]) -> None:
    """Reads past the batches that other sets read.

    others: of sets that follow each other, what each needs, as `read` has it: every one begins where the one before stopped.
    """
    waiting = [[needed for needed in sets if needed] for sets in others]
    found = [0] * len(waiting)
    while any(waiting) and (ids := next(batched, None)) is not None:
        for index, sets in enumerate(waiting):
            found[index] += ids.numel()
            if sets and found[index] >= sets[0]:
                sets.pop(0)
                found[index] = 0


def _left(ends: list[int], wanted: Wanted, length: int) -> tuple[list[int], int]:
    """Where windows begin that no other set has, of a text that is there as a whole, and how many others have.

    ends: of its batches. length: of a window, in the units of `ends`.
    """
    taken = {start for sets in wanted.others for start in _taken(ends, sets, wanted, length)}
    return _free(ends[-1] if ends else 0, taken, length), len(taken)


def _taken(ends: list[int], sets: Sequence[int], wanted: Wanted, length: int) -> set[int]:
    """Where the windows begin that sets which follow each other have: each chose as `_of_stream` chooses."""
    taken: set[int] = set()
    total, start = ends[-1] if ends else 0, 0
    for count in sets:
        if not count:
            continue
        stop = next((end for end in ends if end - start >= OVERSAMPLE * count * length), total)
        found = (stop - start) // length
        places = [start + length * number for number in range(found)] if found >= count else _free(total, taken, length)
        taken |= {places[number] for number in wanted.order(len(places))[:count].tolist()}
        start = stop
    return taken


def _free(total: int, taken: set[int], length: int) -> list[int]:
    """Where whole windows fit between those that begin at `taken`."""
    places: list[int] = []
    start = 0
    for stop in [*sorted(taken), total]:
        places += range(start, stop - length + 1, length)
        start = max(start, stop + length)
    return places


def _within_records(item: Source, wanted: Wanted, tokenizer: Any) -> Tensor:
    """A random window of each record that is longer than a sequence, records in a random order within a pool.

    The pools of other sets come first and are passed over; of a short source, what they left of their pools is taken.
    """
    passed = OVERSAMPLE * max(map(sum, wanted.others), default=0)
    pool: list[Tensor] = []
    found = 0
    for ids in _long_records(item, wanted, tokenizer):
        found += 1
        if found > passed:
            pool.append(ids)
        if len(pool) == OVERSAMPLE * wanted.count:
            break
    if len(pool) < wanted.count:
        # A record counts as a batch of one.
        left, others = _left(list(range(1, found + 1)), wanted, 1)
        if len(left) < wanted.count:
            beside = f", {others} of them for other sets" if others else ""
            raise UsageError(
                f"{text_sources.describe(item)} holds {found:,} records of more than {wanted.length} tokens{beside}, "
                f"{wanted.count} are needed; lower sequences or length, or add text"
            )
        wished = set(left)
        pool = [ids for number, ids in enumerate(_long_records(item, wanted, tokenizer)) if number in wished]
    generator = torch.Generator().manual_seed(wanted.seed)
    rows = []
    for index in torch.randperm(len(pool), generator=generator)[: wanted.count].tolist():
        start = int(torch.randint(0, pool[index].numel() - wanted.length, (1,), generator=generator))
        rows.append(pool[index][start : start + wanted.length])
    return torch.stack(rows)


def _long_records(item: Source, wanted: Wanted, tokenizer: Any) -> Iterator[Tensor]:
    where = text_sources.describe(item)
    for text in text_sources.documents(item, False, tokenizer):
        ids = encode(text, tokenizer, where)
        if ids.numel() > wanted.length:
            yield ids
