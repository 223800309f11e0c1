"""Four levels for a group of weights: weighted EM in one dimension (Lloyd's iteration), all rows at once."""

from itertools import pairwise

import torch
from torch import Tensor

from lbllm_cli.ops.binarize import LEVELS


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
    levels = quantile_levels(weight)
    mass = importance.expand_as(weight)
    moment = mass * weight
    for _ in range(iterations):
        middle = (levels[:, 1:] + levels[:, :-1]) / 2
        above = [(weight > middle[:, k : k + 1]).to(weight.dtype) for k in range(LEVELS - 1)]
        # Sums over members, not differences of sums over tails: those lose a level of little mass beside a massive input.
        # Four masks in turn: half the time of one batched product with them stacked.
        members = [1 - above[0], *(low - high for low, high in pairwise(above)), above[-1]]
        member_mass = torch.stack([(member * mass).sum(1) for member in members], 1)
        member_moment = torch.stack([(member * moment).sum(1) for member in members], 1)
        moved = torch.where(member_mass > 0, member_moment / member_mass, levels)
        moved = moved.sort(dim=1).values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels
