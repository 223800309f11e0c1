"""Levels of 2 bits: the four of a group are two pairs out of tables, times the scale of their row.

A pair is its mean plus and minus its half-width, as LBLLM writes it (mu0, alpha0 and mu1, alpha1). A byte picks the means of both
pairs out of 16, and their half-widths out of 16. A group then takes a byte, where levels of 4 bits and a scale take four: it can
be a quarter as large, and groups of a row are alike enough for one scale.

Two means that are picked together, and two half-widths, say more than four levels that are picked one by one: groups of 16 differ
in which side they lie to and in how wide they are, and that moves all four levels. On weights of two models, taken one by one:
0.61 and 0.59 of the squared error that groups of 64 with levels of 4 bits have, picked one by one 0.73 (scripts/level_tables.py).
"""

import torch
from torch import Tensor

from lbllm_cli.format.kept import kept
from lbllm_cli.format.names import HALF_WIDTHS, MEANS, TABLE_LEVELS

# rank -> code: the two middle levels are the inner pair (bitmap 0), the extremes the outer pair (bitmap 1).
RANK_TO_CODE = (2, 0, 1, 3)
# Of levels in code order: means of the inner and the outer pair, and their half-widths.
_PARTS = ((0.5, 0.5, 0.0, 0.0), (0.0, 0.0, 0.5, 0.5), (-0.5, 0.5, 0.0, 0.0), (0.0, 0.0, -0.5, 0.5))


def _by_rank(rows: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row[code] for code in RANK_TO_CODE) for row in rows)


_TABLES, _ALL_PARTS = {False: TABLE_LEVELS, True: _by_rank(TABLE_LEVELS)}, {False: _PARTS, True: _by_rank(_PARTS)}


def table_of(device: torch.device, ascending: bool, dtype: torch.dtype = torch.int8) -> Tensor:
    """Four levels for each byte, ascending or in code order: [256, 4]."""
    return kept(_TABLES[ascending], dtype, device)


def table_levels(levels: Tensor, scale: Tensor, ascending: bool) -> Tensor:
    """The levels of the table with the least squared error of the four.

    levels: float [..., 4], weight units, ascending or in code order. scale: float16 [...], > 0. Returns int8 [..., 4] in the same
    order. (-0.36, -0.08, 0.09, 0.4), 0.01 -> (-32, -10, 8, 38).
    """
    return table_of(levels.device, ascending)[_places(levels.float() / scale.float().unsqueeze(-1), ascending)]


def pack_places(levels: Tensor) -> Tensor:
    """The byte of each group: levels of the table, int8 [..., 4] in code order -> uint8 [..., 1].

    (-10, 8, -32, 38) -> 0x50.
    """
    return _places(levels.float(), ascending=False).to(torch.uint8).unsqueeze(-1)


def unpack_places(packed: Tensor) -> Tensor:
    """Inverse of `pack_places`: uint8 [..., 1] -> int8 [..., 4] in code order."""
    return table_of(packed.device, ascending=False)[packed[..., 0].long()]


def _places(levels: Tensor, ascending: bool) -> Tensor:
    """Bytes, int64 [...]. levels: float32 [..., 4], in units of the scale."""
    # Means and half-widths lie at right angles to each other: what is nearest in both is nearest.
    parts = levels @ kept(_ALL_PARTS[ascending], torch.float32, levels.device).T
    return _nearest(parts[..., :2], MEANS) + len(MEANS) * _nearest(parts[..., 2:], HALF_WIDTHS)


def _nearest(pairs: Tensor, entries: tuple[tuple[int, int], ...]) -> Tensor:
    """Which entry is nearest to each pair, the first one on a tie: float32 [..., 2] -> int64 [...]."""
    table = kept(entries, torch.float32, pairs.device)
    distances = torch.addmm(table.square().sum(1), pairs.reshape(-1, 2), table.T, alpha=-2)
    return distances.argmin(-1).view(pairs.shape[:-1])
