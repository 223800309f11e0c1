"""Texts to token ids: in pieces, since tokenizing takes 180 bytes of memory per character, with the ids of the whole."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lbllm_cli.errors import UsageError

# Texts that are read before anything may stop: what `data.training` of a hub dataset holds depends on it.
BATCH = 256
# Characters tokenized at once, and of what two neighbouring pieces share.
_PIECE = 1 << 18
_OVERLAP = 1 << 12
# Tokens in a row that both pieces must agree on where they are joined.
_AGREED = 32
# Where they nowhere agree: the longest text that is tokenized at once, in 720 MB.
_WHOLE = 4 << 20


def batches(texts: Iterator[str], tokenizer: Any, where: str) -> Iterator[Tensor]:
    """int64 ids of BATCH texts at a time, without special tokens, each text followed by nothing.

    where: names the texts in messages. Raises UsageError for a long text that cannot be tokenized in pieces.
    """
    while batch := list(islice(texts, BATCH)):
        yield torch.cat([ids for group in _groups(batch) for ids in _encode(group, tokenizer, where)])


def encode(text: str, tokenizer: Any, where: str) -> Tensor:
    """int64 ids of one text, as `batches` gives them."""
    return _encode([text], tokenizer, where)[0]


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


def _encode(texts: list[str], tokenizer: Any, where: str) -> list[Tensor]:
    if len(texts) == 1 and len(texts[0]) > _PIECE and tokenizer.is_fast:
        return [_long(texts[0], tokenizer, where)]
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor(ids, dtype=torch.int64) for ids in found]


def _long(text: str, tokenizer: Any, where: str) -> Tensor:
    """Ids of a text of any length, piece by piece.

    What a tokenizer does depends on what is near: neighbours are joined in the middle of a run of tokens that both have at the
    same places. Of a byte-pair encoding one shared token would do: ids are its encoding if every two neighbours among them are.
    """
    kept: list[Tensor] = []
    ids, spans = _spans(text, 0, tokenizer)
    for start in range(_PIECE - _OVERLAP, len(text) - _OVERLAP, _PIECE - _OVERLAP):
        more, more_spans = _spans(text, start, tokenizer)
        seam = _seam(list(zip(ids, spans, strict=True)), list(zip(more, more_spans, strict=True)), start)
        if seam is None:
            if len(text) > _WHOLE:
                raise UsageError(
                    f"{where}: a text of {len(text):,} characters cannot be tokenized in pieces, for about character {start:,} "
                    f"there is no place to cut it; at most {_WHOLE:,} are tokenized at once: divide it into records"
                )
            return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
        kept.append(torch.tensor(ids[: seam[0]], dtype=torch.int64))
        ids, spans = more[seam[1] :], more_spans[seam[1] :]
    return torch.cat([*kept, torch.tensor(ids, dtype=torch.int64)])


def _spans(text: str, start: int, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a piece, and their first and last places in the whole text."""
    found = tokenizer(text[start : start + _PIECE], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return found["input_ids"], [(start + first, start + last) for first, last in found["offset_mapping"]]


_Token = tuple[int, tuple[int, int]]


def _seam(before: list[_Token], after: list[_Token], start: int) -> tuple[int, int] | None:
    """How many tokens of `before` to take and of `after` to leave out; None where they have no run in common."""
    first = next((index for index in range(len(before), 0, -1) if before[index - 1][1][0] < start), 0)
    runs = {tuple(before[index : index + _AGREED]): index for index in range(first, len(before) - _AGREED + 1)}
    shared = [index for index in range(len(after) - _AGREED + 1) if after[index][1][1] < start + _OVERLAP]
    middle = len(shared) // 2
    for index in sorted(shared, key=lambda index: abs(index - middle)):
        found = runs.get(tuple(after[index : index + _AGREED]))
        if found is not None:
            return found + _AGREED // 2, index + _AGREED // 2
    return None
