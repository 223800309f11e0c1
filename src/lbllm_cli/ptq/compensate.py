"""Codes chosen column by column, each column's error pushed onto the columns not yet coded (GPTQ, arXiv 2210.17323)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lbllm_cli.format.levels import level_values, project_levels, stored_grid
from lbllm_cli.format.names import LEVELS
from lbllm_cli.format.weights import group_count
from lbllm_cli.runtime.backend import backend_of

LevelFit = Callable[[Tensor, Tensor], Tensor]


class RankFit(NamedTuple):
    """A fit in rank order.

    ranks: uint8 [out, in], the index of the weight's level among the group's ascending levels.
    levels: int8 [out, groups, 4], ascending. scale: float16 [out, groups]. level_bits: that levels are rounded to.
    """

    ranks: Tensor
    levels: Tensor
    scale: Tensor
    level_bits: int = 8

    def values(self) -> Tensor:
        """Level values, float32 [out, groups, 4]."""
        return level_values(self.levels, self.scale)


class LevelTable:
    """The levels of one group of columns, for choosing among them one column after another.

    levels: float32 [rows, 4], ascending.
    """

    def __init__(self, levels: Tensor):
        # Transposed and with the midpoints at hand: this runs once per column of every linear.
        self.levels = levels.T.contiguous()
        self.middle = (self.levels[1:] + self.levels[:-1]) / 2

    def choose(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest level of each row, the lower one on a tie: target [rows] -> (rank uint8 [rows], value [rows])."""
        rank = (target > self.middle).sum(0, keepdim=True)
        return rank[0].to(torch.uint8), self.levels.gather(0, rank)[0]


def level_importance(factor: Tensor) -> Tensor:
    """1 / U_jj^2, what an error in column j costs when later columns absorb it: [in, in] -> [in]."""
    return factor.diagonal().reciprocal().square()


def compensate(
    weight: Tensor, factor: Tensor, group_size: int, fit: LevelFit, push: bool = True, importance: Tensor | None = None,
    level_bits: int = 8, row_scale: Tensor | None = None,
) -> RankFit:  # fmt: skip
    """Fits each group's levels, then codes its columns in turn.

    weight: float32 [out, in], left unchanged. factor: float32 [in, in], the upper Cholesky factor U of the inverse
    Hessian. fit(group weights [out, n], importance [n]) -> levels [out, 4]; called with the weights as compensated so far.
    push: False codes every column by its nearest level (the ablation "no compensation").
    importance: float32 [in]; by default `level_importance`. row_scale: float16 [out, 1], of levels of 2 bits.
    out=576, in=576, group_size=128 -> ranks [576, 576], levels [576, 5, 4], scale [576, 5].
    """
    out_features, in_features = weight.shape
    groups = group_count(in_features, group_size)
    # Columns are contiguous in the transpose: the inner loop then runs on whole cache lines.
    remaining = weight.T.contiguous()
    if importance is None:
        importance = level_importance(factor)
    ranks = torch.empty(in_features, out_features, dtype=torch.uint8, device=weight.device)
    levels = torch.empty(out_features, groups, LEVELS, dtype=torch.int8, device=weight.device)
    scale = torch.empty(out_features, groups, dtype=torch.float16, device=weight.device)
    kernels = backend_of(weight.device).kernels
    columns = _columns if kernels is None else kernels.compensate_columns
    for group in range(groups):
        start, end = group * group_size, min((group + 1) * group_size, in_features)
        block = remaining[start:end]
        fitted = fit(block.T.contiguous(), importance[start:end])[:, None]
        levels[:, group : group + 1], scale[:, group : group + 1] = _rounded(fitted, level_bits, row_scale)
        values = level_values(levels[:, group], scale[:, group])
        ranks[start:end], error = columns(block, factor[start:end, start:end], values, push)
        if push:
            remaining[end:].addmm_(factor[start:end, end:].T, error, alpha=-1)
    return RankFit(ranks.T.contiguous(), levels, scale, level_bits)


def _rounded(fitted: Tensor, level_bits: int, row_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Levels [out, 1, 4] on the stored grid: int8, and the scale [out, 1]."""
    kernels = backend_of(fitted.device).kernels
    if kernels is None:
        return project_levels(fitted, level_bits, row_scale)
    # Looking at each group's levels waits for the device; what does not fit is found when the whole is packed.
    if row_scale is None:
        return stored_grid(fitted, level_bits)
    scale = torch.where(torch.isfinite(fitted).all(-1), row_scale, torch.nan)
    return kernels.table_levels(fitted, row_scale, True, torch.int8), scale


def _columns(block: Tensor, factor: Tensor, levels: Tensor, push: bool) -> tuple[Tensor, Tensor]:
    """Codes the columns of one group in turn.

    block: [size, rows], left unchanged. factor: [size, size] of U. levels: [rows, 4]. Returns ranks uint8 [size, rows] and the
    errors that columns of later groups absorb, [size, rows].
    """
    block = block.clone()
    table, ranks, error = LevelTable(levels), torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
    for j in range(len(block)):
        ranks[j], value = table.choose(block[j])
        error[j] = (block[j] - value) / factor[j, j]
        if push:
            block[j + 1 :].addr_(factor[j, j + 1 :], error[j], alpha=-1)
    return ranks, error
