"""Four levels for a group of weights: weighted EM in one dimension (Lloyd's iteration), all rows at once."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lbllm_cli.format.names import LEVELS
from lbllm_cli.ptq.table_choice import best_of_table
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.stage_kernels import (
    HIGH_QUANTILES,
    LOW_QUANTILES,
    NORMAL_LEVELS,
    RANGE_PARTS,
    TABLE_ITERATIONS,
)


def quantile_levels(weight: Tensor) -> Tensor:
    """Levels at the 1/8, 3/8, 5/8 and 7/8 quantiles of each row: float [rows, n] -> [rows, 4], ascending.

    The ablation "quantile levels".
    """
    return _quantiles(weight.sort(dim=1).values, [(2 * k + 1) / (2 * LEVELS) for k in range(LEVELS)])


def _quantiles(ordered: Tensor, shares: Sequence[float]) -> Tensor:
    count = ordered.shape[1]
    return torch.stack([ordered[:, min(count - 1, int(share * count))] for share in shares], dim=1)


def nearest_rank(weight: Tensor, levels: Tensor) -> Tensor:
    """Rank of the nearest level; a tie goes to the lower one.

    weight: float [rows, n]. levels: float [rows, 4], ascending. Returns int64 [rows, n] in 0..3.
    """
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    rank = (weight > middle[:, :1]).long()
    rank += weight > middle[:, 1:2]
    rank += weight > middle[:, 2:]
    return rank


def starts(weight: Tensor, ordered: Tensor) -> list[Tensor]:
    """Where EM begins, each [rows, 4]. weight: [rows, n]. ordered: the same, rows sorted.

    EM stops at the next local optimum. On weights of SmolLM2-135M the best of these four has 0.72 of the squared error that
    quantiles at 1/8, 3/8, 5/8 and 7/8 lead to in groups of 16, and 0.91 in groups of 64 (scripts/level_tables.py); four more
    starts took another hundredth.
    """
    low, high, mean = ordered[:, :1], ordered[:, -1:], weight.mean(1, keepdim=True)
    deviation = (weight - mean).square().mean(1, keepdim=True).sqrt()
    return [
        low + (high - low) * torch.tensor(RANGE_PARTS, device=weight.device),
        mean + deviation * torch.tensor(NORMAL_LEVELS, device=weight.device),
        _quantiles(ordered, LOW_QUANTILES),
        _quantiles(ordered, HIGH_QUANTILES),
    ]


class _Rows(NamedTuple):
    """Weights of each row in order, [rows, n], and running totals of mass and of mass times weight, float64 [rows, n + 1].

    In this order a level's members are a run, and its sums are differences of totals: an iteration then costs a few operations
    per row instead of per weight. In float64, or a level of little mass beside a massive input would be lost in their rounding.
    scale: float16 [rows], of levels of 2 bits.
    """

    ascending: Tensor
    mass: Tensor
    moment: Tensor
    scale: Tensor | None

    def at(self, rows: Tensor) -> "_Rows":
        """Those rows."""
        scale = None if self.scale is None else self.scale[rows]
        return _Rows(self.ascending[rows], self.mass[rows], self.moment[rows], scale)

    def members(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Mass and moment of those of each level, [rows, 4]."""
        middle = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = pad(torch.searchsorted(self.ascending, middle, right=True), (1, 1))
        ends[:, -1] = self.ascending.shape[1]
        return self.mass.gather(1, ends).diff(dim=1), self.moment.gather(1, ends).diff(dim=1)

    def means(self, levels: Tensor) -> Tensor:
        """Of the members of each level; where there are none, the level. Ascending."""
        mass, moment = self.members(levels)
        return torch.where(mass > 0, (moment / mass).to(levels.dtype), levels).sort(dim=1).values

    def entries(self, levels: Tensor) -> Tensor:
        """The best of the table for the members of each level."""
        assert self.scale is not None
        mass, moment = self.members(levels)
        return best_of_table(moment, mass, self.scale) * self.scale.float().unsqueeze(1)

    def gain(self, levels: Tensor) -> Tensor:
        """By how much the weighted error is below that of zeros, [rows, 1]."""
        mass, moment = self.members(levels)
        values = levels.double()
        return (values * (2 * moment - mass * values)).sum(1, keepdim=True)


def fit_levels(weight: Tensor, importance: Tensor, iterations: int, scale: Tensor | None = None) -> Tensor:
    """EM: E-step nearest level, M-step importance-weighted mean of each level's members. The best of four starts.

    weight: float [rows, n], one group per row. importance: float [n] or [rows, n], > 0: the cost of a squared error in
    that input (LBLLM stage 1). scale: float16 [rows], of levels of 2 bits: they end in the table, and the best of four is the
    best of these. A level without members stays where it is. Before that the weighted error never rises from one
    iteration to the next. Returns levels, float [rows, 4], ascending. rows=576, n=64 -> [576, 4].
    """
    if (kernels := backend_of(weight.device).kernels) is not None:
        return kernels.fit_levels(weight, importance, iterations, scale)
    ascending, order = weight.sort(dim=1)
    mass = importance.expand_as(weight).gather(1, order).double()
    rows = _Rows(ascending, pad(mass.cumsum(1), (1, 0)), pad((mass * ascending).cumsum(1), (1, 0)), scale)
    runs = [_repeated(_Rows.means, rows, levels, iterations) for levels in starts(weight, ascending)]
    if scale is not None:
        runs = [_repeated(_Rows.entries, rows, levels, TABLE_ITERATIONS) for levels in runs]
    found, best = runs[0], rows.gain(runs[0])
    for levels in runs[1:]:
        gain = rows.gain(levels)
        found, best = torch.where(gain > best, levels, found), torch.maximum(gain, best)
    return found


def _repeated(step: Callable[[_Rows, Tensor], Tensor], rows: _Rows, levels: Tensor, iterations: int) -> Tensor:
    """levels [rows, 4] after so many steps.

    A row that has not moved will not, and most stop early: of groups of 16 of SmolLM2-135M a fifth still moves after one step on
    the table, a thirtieth after two. Once fewer than half do, the others are left out.
    """
    found, of = levels.clone(), torch.arange(len(levels), device=levels.device)
    for _ in range(iterations):
        moved = step(rows, levels)
        moving = (moved != levels).any(1).nonzero().squeeze(1)
        levels = moved
        if not len(moving):
            break
        if 2 * len(moving) < len(levels):
            found[of] = levels
            of, rows, levels = of[moving], rows.at(moving), levels[moving]
    found[of] = levels
    return found
