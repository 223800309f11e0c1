"""Four levels for a group of weights: weighted EM in one dimension (Lloyd's iteration), all rows at once."""

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
        # Four masks instead of scatter_add: 3x faster on a CPU for groups of 64 to 128.
        middle = (levels[:, 1:] + levels[:, :-1]) / 2
        above = [(weight > middle[:, k : k + 1]).to(weight.dtype) for k in range(LEVELS - 1)]
        masses = [mass.sum(1)] + [(mass * a).sum(1) for a in above]
        moments = [moment.sum(1)] + [(moment * a).sum(1) for a in above]
        zero = torch.zeros_like(masses[0])
        member_mass = torch.stack(masses, 1) - torch.stack([*masses[1:], zero], 1)
        member_moment = torch.stack(moments, 1) - torch.stack([*moments[1:], zero], 1)
        # Differences of sums leave rounding dust where a level has no members: below it the level counts as empty.
        empty = member_mass <= 1e-6 * masses[0].unsqueeze(1)
        moved = torch.where(empty, levels, member_moment / member_mass.clamp_min(1e-30))
        moved = moved.sort(dim=1).values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels
