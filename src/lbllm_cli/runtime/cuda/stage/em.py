"""Four levels for a group of weights: `ptq.em.fit_levels` with all iterations in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.format.level_table import table_of
from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.stage.levels import best_of_table, level_at, nearest_rank, store_levels
from lbllm_cli.runtime.stage_kernels import HIGH_QUANTILES, LOW_QUANTILES, NORMAL_LEVELS, RANGE_PARTS, TABLE_ITERATIONS

# Weights of a program.
_TILE = 1024
_RANGE, _NORMAL = tl.constexpr(RANGE_PARTS), tl.constexpr(NORMAL_LEVELS)
_LOW, _HIGH = tl.constexpr(LOW_QUANTILES), tl.constexpr(HIGH_QUANTILES)
_TABLE_ITERATIONS = tl.constexpr(TABLE_ITERATIONS)


@triton.jit
def _mean(member, mass, moment, level):
    """Weighted mean of each row's members, float32, the level where there are none; and their mass."""
    # In float64 as in torch: the levels are then the same but for a last bit.
    total = tl.sum(tl.where(member, mass, 0.0), 1)
    mean = tl.sum(tl.where(member, moment, 0.0), 1) / tl.where(total > 0, total, 1.0)
    return tl.where(total > 0, mean.to(tl.float32), level), total


@triton.jit
def _start(number: tl.constexpr, x, here, ordered, start, known, n):
    """The levels that EM begins at: `ptq.em.starts`."""
    if number == 0:
        low, high = tl.load(ordered + start, mask=known, other=0.0), tl.load(ordered + start + n - 1, mask=known, other=0.0)
        a, b = low + (high - low) * _RANGE[0], low + (high - low) * _RANGE[1]
        c, d = low + (high - low) * _RANGE[2], low + (high - low) * _RANGE[3]
    elif number == 1:
        mean = tl.sum(x, 1) / n
        off = tl.where(here, x - mean[:, None], 0.0)
        deviation = tl.sqrt(tl.sum(off * off, 1) / n)
        a, b = mean + deviation * _NORMAL[0], mean + deviation * _NORMAL[1]
        c, d = mean + deviation * _NORMAL[2], mean + deviation * _NORMAL[3]
    else:
        shares: tl.constexpr = _LOW if number == 2 else _HIGH
        a = tl.load(ordered + start + tl.minimum(n - 1, (shares[0] * n).to(tl.int32)), mask=known, other=0.0)
        b = tl.load(ordered + start + tl.minimum(n - 1, (shares[1] * n).to(tl.int32)), mask=known, other=0.0)
        c = tl.load(ordered + start + tl.minimum(n - 1, (shares[2] * n).to(tl.int32)), mask=known, other=0.0)
        d = tl.load(ordered + start + tl.minimum(n - 1, (shares[3] * n).to(tl.int32)), mask=known, other=0.0)
    return a, b, c, d


@triton.jit
def _means(x, mass, moment, a, b, c, d):
    """Of the members of each level, and what these weigh."""
    # The mean of a level's members lies in its cell, and an empty level between its neighbours' cells: they stay in order.
    rank = nearest_rank(x, a[:, None], b[:, None], c[:, None], d[:, None])
    a, e = _mean(rank == 0, mass, moment, a)
    b, f = _mean(rank == 1, mass, moment, b)
    c, g = _mean(rank == 2, mass, moment, c)
    d, h = _mean(rank == 3, mass, moment, d)
    return a, b, c, d, e, f, g, h


@triton.jit
def _on_table(x, mass, moment, a, b, c, d, table, unit, ROWS: tl.constexpr):
    """The best of the table for the members of each level."""
    a, b, c, d, e, f, g, h = _means(x, mass, moment, a, b, c, d)
    none = tl.zeros([ROWS], tl.float32)
    e, f, g, h = e.to(tl.float32), f.to(tl.float32), g.to(tl.float32), h.to(tl.float32)
    costs = e, none, none, none, f, none, none, g, none, h
    a, b, c, d = best_of_table(table, unit, (none, none, none, none), costs, (a, b, c, d), ROWS)
    return a * unit, b * unit, c * unit, d * unit


@triton.jit
def fit_levels(
    weight, importance, ordered, scale, table, levels, rows, n, between, iterations,
    ROWS: tl.constexpr, SIZE: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows. ordered: weight, each row sorted. between: stride of importance from row to row. TABLE: whether
    levels are of the table (see `best_of_table`), in units of scale.
    """
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)[None, :]
    known = row < rows
    here = known[:, None] & (column < n)
    start = row.to(tl.int64) * n
    x = tl.load(weight + start[:, None] + column, mask=here, other=0.0)
    mass = tl.load(importance + row.to(tl.int64)[:, None] * between + column, mask=here, other=0.0).to(tl.float64)
    moment = mass * x.to(tl.float64)
    best = tl.full([ROWS], float("-inf"), tl.float64)
    best_a, best_b = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    best_c, best_d = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for number in tl.static_range(4):
        a, b, c, d = _start(number, x, here, ordered, start, known, n)
        for _ in range(iterations):
            a, b, c, d, _, _, _, _ = _means(x, mass, moment, a, b, c, d)
        if TABLE:
            unit = tl.load(scale + row, mask=known, other=1.0).to(tl.float32)
            for _ in range(_TABLE_ITERATIONS):
                a, b, c, d = _on_table(x, mass, moment, a, b, c, d, table, unit, ROWS)
        rank = nearest_rank(x, a[:, None], b[:, None], c[:, None], d[:, None])
        value = level_at(rank, a[:, None], b[:, None], c[:, None], d[:, None]).to(tl.float64)
        gain = tl.sum(value * (2 * moment - mass * value), 1)
        better = gain > best
        best = tl.where(better, gain, best)
        best_a, best_b = tl.where(better, a, best_a), tl.where(better, b, best_b)
        best_c, best_d = tl.where(better, c, best_c), tl.where(better, d, best_d)
    store_levels(levels, row * 4, known, best_a, best_b, best_c, best_d)


@operator("fit_levels(Tensor weight, Tensor importance, Tensor ordered, Tensor? scale, int iterations, Tensor(a!) levels)")
def fit(weight: Tensor, importance: Tensor, ordered: Tensor, scale: Tensor | None, iterations: int, levels: Tensor) -> None:
    """weight [rows, n], importance [rows, n] or [n], ordered: weight with its rows sorted, scale [rows] -> levels [rows, 4]."""
    rows, n = weight.shape
    size = triton.next_power_of_2(n)
    count = max(1, _TILE // size)
    table = table_of(weight.device, ascending=True, dtype=torch.float32)
    fit_levels[(triton.cdiv(rows, count),)](
        weight, importance, ordered, weight if scale is None else scale, table, levels, rows, n,
        n if importance.dim() == 2 else 0, iterations, ROWS=count, SIZE=size, TABLE=scale is not None,
        num_warps=max(4, size // 256),
    )  # fmt: skip
