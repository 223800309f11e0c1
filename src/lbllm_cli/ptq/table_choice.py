"""The best four levels of the table for a group whose codes are known."""

import torch
from torch import Tensor

from lbllm_cli.format.level_table import table_of
from lbllm_cli.format.names import LEVELS

_PAIRS = [(a, b) for a in range(LEVELS) for b in range(a, LEVELS)]


def best_of_table(slope: Tensor, curve: Tensor, scale: Tensor) -> Tensor:
    """The levels v of the table, in units of scale, with the least  v C v - 2 b v: what an error of weights costs by its level.

    slope: b, float [rows, 4]. curve: C, symmetric, [rows, 4, 4]. scale: float16 [rows]. Returns int8 [rows, 4], ascending; the
    first of equally good ones. All 256 are tried, by one product: terms of rows [rows, 14] times those of bytes [14, 256].
    b = (-36, 0, 0, 40), C = diag(1, 0, 0, 1), scale 1 -> (-36, -7, 17, 40).
    """
    # In float64: behind a massive input one level costs a million times what another does, and both are to be right.
    slope, curve, unit = slope.double(), curve.double(), scale.double().unsqueeze(1)
    table = table_of(slope.device, ascending=True, dtype=torch.float64)
    weights = torch.stack([curve[:, a, b] * (1 if a == b else 2) for a, b in _PAIRS], dim=1)
    products = torch.stack([table[:, a] * table[:, b] for a, b in _PAIRS], dim=0)
    costs = torch.addmm((weights * unit.square()) @ products, slope * unit, table.T, alpha=-2)
    return table_of(slope.device, ascending=True)[costs.argmin(1)]
