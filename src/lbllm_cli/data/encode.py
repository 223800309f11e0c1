"""Texts to token ids: in pieces, since tokenizing takes 180 bytes of memory per character, with the ids of the whole."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lbllm_cli.core.errors import UsageError

# Texts that are read before anything may stop: what `data.training` of a hub dataset holds depends on it.
BATCH = 256
# Characters of a piece, and of what two neighbours share.
_PIECE = 1 << 18
_OVERLAP = 1 << 12
# Pieces that are tokenized beside each other, each by one thread.
_AT_ONCE = 2
# Tokens in a row that both pieces must agree on where they are joined.
_AGREED = 32
# Where they nowhere agree: the longest text that is tokenized at once, in 720 MB.
_WHOLE = 4 << 20


def batches(texts: Iterator[str], tokenizer: Any, where: str, enough: int | None = None) -> Iterator[Tensor]:
    """int64 ids of BATCH texts at a time, without special tokens, each text followed by nothing.

    where: names the texts in messages. enough: ids of one text of which no more are needed.
    Raises UsageError for a long text that cannot be tokenized in pieces.
    """
    while batch := list(islice(texts, BATCH)):
        yield torch.cat([ids for group in _groups(batch) for ids in _encode(group, tokenizer, where, enough)])


def encode(text: str, tokenizer: Any, where: str, enough: int | None = None) -> Tensor:
    """int64 ids of one text, as `batches` gives them."""
    return _encode([text], tokenizer, where, enough)[0]


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Neighbours that together are about one piece; a longer text stands alone."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > _PIECE:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    yield group


def _encode(texts: list[str], tokenizer: Any, where: str, enough: int | None) -> list[Tensor]:
    if len(texts) == 1 and len(texts[0]) > _PIECE and tokenizer.is_fast:
        return [_long(texts[0], tokenizer, where, enough)]
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor(ids, dtype=torch.int64) for ids in found]


def _long(text: str, tokenizer: Any, where: str, enough: int | None) -> Tensor:
    """Ids of a text of any length, piece by piece.

    What a tokenizer does depends on what is near: neighbours are joined in the middle of a run of tokens that both have at the
    same places. Of a byte-pair encoding one shared token would do: ids are its encoding if every two neighbours among them are.
    """
    kept: list[Tensor] = []
    found = 0
    pieces = _pieces(text, tokenizer)
    ids, spans = next(pieces)
    for number, (more, more_spans) in enumerate(pieces, 1):
        start = number * (_PIECE - _OVERLAP)
        seam = _seam((ids, spans), (more, more_spans))
        if seam is None:
            if len(text) > _WHOLE:
                raise UsageError(
                    f"{where}: a text of {len(text):,} characters cannot be tokenized in pieces, for about character {start:,} "
                    f"there is no place to cut it; at most {_WHOLE:,} are tokenized at once: divide it into records"
                )
            return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
        kept.append(torch.tensor(ids[: seam[0]], dtype=torch.int64))
        found += seam[0]
        ids, spans = more[seam[1] :], more_spans[seam[1] :]
        if enough is not None and found >= enough:
            return torch.cat(kept)
    return torch.cat([*kept, torch.tensor(ids, dtype=torch.int64)])


_Spans = list[tuple[int, int]]


def _pieces(text: str, tokenizer: Any) -> Iterator[tuple[list[int], _Spans]]:
    """Ids of each piece, and the first and last place of every token in its piece."""
    starts = range(0, len(text) - _OVERLAP, _PIECE - _OVERLAP)
    for first in range(0, len(starts), _AT_ONCE):
        texts = [text[start : start + _PIECE] for start in starts[first : first + _AT_ONCE]]
        found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        yield from zip(found["input_ids"], found["offset_mapping"], strict=True)


def _seam(before: tuple[list[int], _Spans], after: tuple[list[int], _Spans]) -> tuple[int, int] | None:
    """How many tokens of `before` to take and of `after` to leave out; None where they have no run in common."""
    step = _PIECE - _OVERLAP  # from the start of one piece to that of the next
    first = next((index for index in range(len(before[1]), 0, -1) if before[1][index - 1][0] < step), 0)
    end = next((index for index, span in enumerate(after[1]) if span[1] >= _OVERLAP), len(after[1])) + _AGREED - 1
    tail = list(zip(before[0][first:], before[1][first:], strict=True))
    head = [(token, (start + step, last + step)) for token, (start, last) in zip(after[0][:end], after[1][:end], strict=True)]
    runs = {tuple(tail[index : index + _AGREED]): index for index in range(len(tail) - _AGREED + 1)}
    for index in sorted(range(len(head) - _AGREED + 1), key=lambda index: abs(2 * index - len(head))):
        found = runs.get(tuple(head[index : index + _AGREED]))
        if found is not None:
            return first + found + _AGREED // 2, index + _AGREED // 2
    return None
