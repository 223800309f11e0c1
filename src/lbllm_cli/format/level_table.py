"""Levels of 2 bits: each is one of four values out of a table, times the scale of its row.

A group then takes a byte, where levels of 4 bits and a scale take four: it can be a quarter as large. Groups of a row are alike
enough for one scale, and what a table lacks in values a group of 16 more than makes up for. On weights of two models, taken one
by one: 0.68 and 0.67 of the squared error that groups of 64 with levels of 4 bits have (scripts/level_tables.py).
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lbllm_cli.format.names import LEVELS, SHIFTS, TABLE_LEVELS

# Of a level, in code order: its sign, and its row of TABLE_LEVELS.
_SIGNS, _PAIRS = (-1, 1, -1, 1), (0, 0, 1, 1)
# rank -> code: the two middle levels are the inner pair (bitmap 0), the extremes the outer pair (bitmap 1).
RANK_TO_CODE = (2, 0, 1, 3)


def table_levels(levels: Tensor, scale: Tensor, ascending: bool) -> Tensor:
    """The value of its table that is nearest to each level, the smaller one on a tie.

    levels: float [..., 4], weight units, ascending or in code order. scale: [...], > 0. Returns int8 [..., 4] in the same order.
    Values of the four tables do not overlap: what ascends still does. (-0.9, -0.1, 0.2, 0.8), 0.01 -> (-81, -13, 22, 81).
    """
    unit = scale.float()

    def above(code: int, at: int) -> Callable[[int, int], Tensor]:
        return lambda low, high: levels[..., at] * _SIGNS[code] > unit * ((low + high) / 2)

    return torch.stack([_value(code, above(code, at)) for at, code in enumerate(_order(ascending))], dim=-1)


def pack_places(levels: Tensor) -> Tensor:
    """A byte for each group, two bits for each level, that of code 0 lowest: int8 [..., 4] in code order -> uint8 [..., 1].

    (-4, 13, -127, 41) -> 0b00_11_01_00.
    """
    packed = torch.zeros(*levels.shape[:-1], 1, dtype=torch.uint8, device=levels.device)
    for code, shift in enumerate(SHIFTS):
        size = levels[..., code : code + 1].abs()
        for value in TABLE_LEVELS[_PAIRS[code]][:-1]:
            packed += (size > value).to(torch.uint8) << shift
    return packed


def unpack_places(packed: Tensor) -> Tensor:
    """Inverse of `pack_places`: uint8 [..., 1] -> int8 [..., 4] in code order."""

    def above(code: int) -> Callable[[int, int], Tensor]:
        place = (packed[..., 0] >> SHIFTS[code]) & 3
        return lambda low, _: place > TABLE_LEVELS[_PAIRS[code]].index(low)

    return torch.stack([_value(code, above(code)) for code in range(LEVELS)], dim=-1)


def _order(ascending: bool) -> tuple[int, ...]:
    return RANK_TO_CODE if ascending else tuple(range(LEVELS))


def _value(code: int, above: Callable[[int, int], Tensor]) -> Tensor:
    """int8, of a code's table. above(low, high): whether it is the higher of two neighbours, or one above them.

    By sums: what looks it up in a tensor waits for a GPU that this is put on.
    """
    table = TABLE_LEVELS[_PAIRS[code]]
    steps = [above(low, high).to(torch.int8) * (high - low) for low, high in pairwise(table)]
    return (sum(steps[1:], steps[0]) + table[0]) * _SIGNS[code]
