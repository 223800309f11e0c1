"""Four levels for a group of weights: weighted EM in one dimension (Lloyd's iteration), all rows at once."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lbllm_cli.format.names import LEVELS
from lbllm_cli.runtime.backend import backend_of


def quantile_levels(weight: Tensor) -> Tensor:
    """Levels at the 1/8, 3/8, 5/8 and 7/8 quantiles of each row: float [rows, n] -> [rows, 4], ascending.

    The start of EM, and alone the ablation "quantile levels".
    """
    at = torch.tensor([(2 * k + 1) / (2 * LEVELS) for k in range(LEVELS)], device=weight.device)
    ordered = weight.sort(dim=1).values
    index = (at * weight.shape[1]).long().clamp(max=weight.shape[1] - 1)
    return ordered[:, index]


def nearest_rank(weight: Tensor, levels: Tensor) -> Tensor:
    """Rank of the nearest level; a tie goes to the lower one.

    weight: float [rows, n]. levels: float [rows, 4], ascending. Returns int64 [rows, n] in 0..3.
    """
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    rank = (weight > middle[:, :1]).long()
    rank += weight > middle[:, 1:2]
    rank += weight > middle[:, 2:]
    return rank


def fit_levels(weight: Tensor, importance: Tensor, iterations: int) -> Tensor:
    """EM: E-step nearest level, M-step importance-weighted mean of each level's members.

    weight: float [rows, n], one group per row. importance: float [n] or [rows, n], > 0: the cost of a squared error in
    that input (LBLLM stage 1). A level without members stays where it is. The weighted error never rises from one
    iteration to the next. Returns levels, float [rows, 4], ascending. rows=576, n=64 -> [576, 4].
    """
    if (kernels := backend_of(weight.device).kernels) is not None:
        return kernels.fit_levels(weight, importance, iterations)
    # In sorted order a level's members are a run, and its sums are differences of running totals: an iteration then costs
    # a few operations per row instead of per weight. Totals in float64, or a level of little mass beside a massive input
    # would be lost in their rounding.
    ascending, order = weight.sort(dim=1)
    mass = importance.expand_as(weight).gather(1, order).double()
    total_mass = pad(mass.cumsum(1), (1, 0))
    total_moment = pad((mass * ascending).cumsum(1), (1, 0))
    levels = quantile_levels(weight)
    for _ in range(iterations):
        middle = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = pad(torch.searchsorted(ascending, middle, right=True), (1, 1))
        ends[:, -1] = weight.shape[1]
        member_mass = total_mass.gather(1, ends).diff(dim=1)
        member_moment = total_moment.gather(1, ends).diff(dim=1)
        moved = torch.where(member_mass > 0, (member_moment / member_mass).to(weight.dtype), levels).sort(dim=1).values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels
