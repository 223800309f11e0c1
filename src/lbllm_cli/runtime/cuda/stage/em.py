"""Four levels for a group of weights: `ptq.em.fit_levels` with all iterations in one kernel."""

import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.stage.levels import nearest_rank, store_levels

# Weights of a program.
_TILE = 1024


@triton.jit
def _mean(member, mass, moment, level):
    """Weighted mean of each row's members, float32; the level where there are none."""
    # In float64 as in torch: the levels are then the same but for a last bit.
    total = tl.sum(tl.where(member, mass, 0.0), 1)
    mean = tl.sum(tl.where(member, moment, 0.0), 1) / tl.where(total > 0, total, 1.0)
    return tl.where(total > 0, mean.to(tl.float32), level)


@triton.jit
def fit_levels(weight, importance, ordered, levels, rows, n, between, iterations, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """A program: ROWS rows. ordered: weight, each row sorted. between: stride of importance from row to row."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)[None, :]
    known = row < rows
    here = known[:, None] & (column < n)
    start = row.to(tl.int64) * n
    x = tl.load(weight + start[:, None] + column, mask=here, other=0.0)
    mass = tl.load(importance + row.to(tl.int64)[:, None] * between + column, mask=here, other=0.0).to(tl.float64)
    moment = mass * x.to(tl.float64)
    a = tl.load(ordered + start + n // 8, mask=known, other=0.0)
    b = tl.load(ordered + start + 3 * n // 8, mask=known, other=0.0)
    c = tl.load(ordered + start + 5 * n // 8, mask=known, other=0.0)
    d = tl.load(ordered + start + 7 * n // 8, mask=known, other=0.0)
    # The mean of a level's members lies in its cell, and an empty level between its neighbours' cells: they stay in order.
    for _ in range(iterations):
        rank = nearest_rank(x, a[:, None], b[:, None], c[:, None], d[:, None])
        a, b = _mean(rank == 0, mass, moment, a), _mean(rank == 1, mass, moment, b)
        c, d = _mean(rank == 2, mass, moment, c), _mean(rank == 3, mass, moment, d)
    store_levels(levels, row * 4, known, a, b, c, d)


@operator("fit_levels(Tensor weight, Tensor importance, Tensor ordered, int iterations, Tensor(a!) levels)")
def fit(weight: Tensor, importance: Tensor, ordered: Tensor, iterations: int, levels: Tensor) -> None:
    """weight [rows, n], importance [rows, n] or [n], ordered: weight with its rows sorted -> levels [rows, 4]."""
    rows, n = weight.shape
    size = triton.next_power_of_2(n)
    count = max(1, _TILE // size)
    fit_levels[(triton.cdiv(rows, count),)](
        weight, importance, ordered, levels, rows, n, n if importance.dim() == 2 else 0, iterations, ROWS=count, SIZE=size,
        num_warps=max(4, size // 256),
    )  # fmt: skip
