"""Four levels for a group of weights: `ptq.em.fit_levels` with all iterations in one kernel."""

import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.stage.levels import level_at, nearest_rank, nearest_value, store_levels
from lbllm_cli.runtime.stage_kernels import HIGH_QUANTILES, LOW_QUANTILES, NORMAL_LEVELS, RANGE_PARTS, TABLE_ITERATIONS

# Weights of a program.
_TILE = 1024
_RANGE, _NORMAL = tl.constexpr(RANGE_PARTS), tl.constexpr(NORMAL_LEVELS)
_LOW, _HIGH = tl.constexpr(LOW_QUANTILES), tl.constexpr(HIGH_QUANTILES)
_TABLE_ITERATIONS = tl.constexpr(TABLE_ITERATIONS)


@triton.jit
def _mean(member, mass, moment, level):
    """Weighted mean of each row's members, float32; the level where there are none."""
    # In float64 as in torch: the levels are then the same but for a last bit.
    total = tl.sum(tl.where(member, mass, 0.0), 1)
    mean = tl.sum(tl.where(member, moment, 0.0), 1) / tl.where(total > 0, total, 1.0)
    return tl.where(total > 0, mean.to(tl.float32), level)


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
def _on_table(a, b, c, d, unit):
    return (
        nearest_value(a, unit, 0) * unit, nearest_value(b, unit, 1) * unit, nearest_value(c, unit, 2) * unit,
        nearest_value(d, unit, 3) * unit,
    )  # fmt: skip


@triton.jit
def _means(x, mass, moment, a, b, c, d):
    """Of the members of each level."""
    # The mean of a level's members lies in its cell, and an empty level between its neighbours' cells: they stay in order.
    rank = nearest_rank(x, a[:, None], b[:, None], c[:, None], d[:, None])
    a, b = _mean(rank == 0, mass, moment, a), _mean(rank == 1, mass, moment, b)
    return a, b, _mean(rank == 2, mass, moment, c), _mean(rank == 3, mass, moment, d)


@triton.jit
def fit_levels(
    weight, importance, ordered, scale, levels, rows, n, between, iterations,
    ROWS: tl.constexpr, SIZE: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows. ordered: weight, each row sorted. between: stride of importance from row to row. TABLE: whether
    levels are values of the table, in units of scale.
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
            a, b, c, d = _means(x, mass, moment, a, b, c, d)
        if TABLE:
            unit = tl.load(scale + row, mask=known, other=1.0).to(tl.float32)
            a, b, c, d = _on_table(a, b, c, d, unit)
            for _ in range(_TABLE_ITERATIONS):
                a, b, c, d = _means(x, mass, moment, a, b, c, d)
                a, b, c, d = _on_table(a, b, c, d, unit)
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
    fit_levels[(triton.cdiv(rows, count),)](
        weight, importance, ordered, weight if scale is None else scale, levels, rows, n, n if importance.dim() == 2 else 0,
        iterations, ROWS=count, SIZE=size, TABLE=scale is not None, num_warps=max(4, size // 256),
    )  # fmt: skip
