"""Sequences in which passages come again: text that asks a model to look back."""

import torch
from torch import Tensor


def with_repeats(rows: Tensor, share: float, seed: int) -> Tensor:
    """Rows of which a share is rewritten so that passages come again, each of them a passage later.

    A row becomes A B A, C D C and so on until it is full: its own text in order, of which the end falls away. A and C have a 32nd
    to a quarter of its tokens, B and D a 32nd to half of them. Which rows, and where they are cut, `seed` decides.

    rows: int64 [sequences, length]; share: 0 to 1, of which the nearest whole number of rows is taken. Returns the same shape.
    Row 0 .. 15 with passages of 2 and 3: 0 1 2 3 4 0 1 5 6 7 8 9 5 6 10 11.
    """
    generator = torch.Generator().manual_seed(seed)
    found = rows.clone()
    for index in torch.randperm(len(rows), generator=generator)[: round(share * len(rows))].tolist():
        found[index] = _repeated(rows[index], generator)
    return found


def _repeated(row: Tensor, generator: torch.Generator) -> Tensor:
    length = len(row)
    pieces: list[Tensor] = []
    start = filled = 0
    while filled < length:
        passage, between = (
            int(torch.randint(max(1, length // 32), max(1, length // part) + 1, (), generator=generator)) for part in (4, 2)
        )
        again = row[start : start + passage]
        pieces += [again, row[start + passage : start + passage + between], again]
        start, filled = start + passage + between, filled + 2 * passage + between
    return torch.cat(pieces)[:length]
