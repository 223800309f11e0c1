"""The best four levels of the table for a group whose codes are known."""

from functools import cache

import torch
from torch import Tensor

from lbllm_cli.format.level_table import table_of
from lbllm_cli.format.names import LEVELS

_PAIRS = [(a, b) for a in range(LEVELS) for b in range(a + 1, LEVELS)]
_FIRST, _SECOND = ([pair[at] for pair in _PAIRS] for at in range(2))


def best_of_table(slope: Tensor, curve: Tensor, scale: Tensor) -> Tensor:
    """The levels v of the table, in units of scale, with the least  v C v - 2 b v: what an error of weights costs by its level.

    slope: b, float [rows, 4]. curve: C, symmetric, [rows, 4, 4], or [rows, 4], the diagonal where all else is 0. scale: float16
    [rows]. Returns int8 [rows, 4], ascending; the first of equally good ones. All 256 are tried, by one product: terms of rows
    [rows, 14] times those of bytes [14, 256].
    b = (-36, 0, 0, 40), C = diag(1, 0, 0, 1), scale 1 -> (-36, -7, 17, 40).
    """
    # In float64: behind a massive input one level costs a million times what another does, and both are to be right.
    unit = scale.double().unsqueeze(1)
    if curve.dim() == 2:
        squares = curve.double() * unit.square()
    else:
        diagonal, pairs = curve.diagonal(dim1=1, dim2=2), curve[:, _FIRST, _SECOND]
        squares = torch.cat([diagonal, pairs], dim=1).double() * unit.square()
    terms = torch.cat([slope.double() * unit, squares], dim=1)
    of_bytes = _terms(slope.device)[: terms.shape[1]]
    # So many rows at once bound the memory; where the smallest is, min says in two thirds of the time that argmin takes.
    places = torch.cat([(some @ of_bytes).min(1).indices for some in terms.split(4096)])
    return table_of(slope.device, ascending=True)[places]


@cache
def _terms(device: torch.device) -> Tensor:
    """What each byte's levels make of a row's terms: themselves, their squares, and their products; float64 [14, 256]."""
    table = table_of(device, ascending=True, dtype=torch.float64).T
    return torch.cat([-2 * table, table.square(), 2 * table[_FIRST] * table[_SECOND]])
