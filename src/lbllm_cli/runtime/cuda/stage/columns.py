"""The columns of one group in turn, rows beside each other: what error compensation and coordinate descent spend their time on.

A program keeps all columns of some rows in registers and takes one after another out of them by a masked sum: registers have no
addresses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.format.level_table import table_of
from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.stage.levels import best_of_table, level_at, load_levels, nearest_rank, store_levels

# Rows of a program, one warp: COLUMNS_MAX columns of them are 64 registers a thread.
ROWS = 16
# Of one that looks for levels: with more rows what it compares spills.
LEVEL_ROWS = 4


@triton.jit
def _load_columns(block, row, size, rows, SIZE: tl.constexpr):
    """Columns of some rows: block [size, rows], row [n] -> float32 [SIZE, n]."""
    line = tl.arange(0, SIZE)[:, None]
    return tl.load(block + line * rows + row[None, :], mask=(line < size) & (row < rows)[None, :], other=0.0)


@triton.jit
def _without(tile, matrix, j, moved, size, down, right, SIZE: tl.constexpr):
    """The tile after `moved` [n] was pushed onto the columns behind column j.

    By row j of a matrix, whose strides are down and right.
    """
    line = tl.arange(0, SIZE)
    share = tl.load(matrix + j * down + line * right, mask=(line > j) & (line < size), other=0.0)
    return tile - share[:, None] * moved[None, :]


@triton.jit
def compensate_columns(
    block, factor, levels, ranks, errors, size, rows, down, right, between, PUSH: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows of a group. down, right: strides of factor. between: of levels, from row to row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    a, b, c, d = load_levels(levels, row.to(tl.int64) * between, here)
    tile = _load_columns(block, row, size, rows, SIZE)
    line = tl.arange(0, SIZE)[:, None]
    for j in range(size):
        target = tl.sum(tl.where(line == j, tile, 0.0), 0)
        rank = nearest_rank(target, a, b, c, d)
        pivot = tl.load(factor + j * down + j * right)
        error = tl.div_rn(target - level_at(rank, a, b, c, d), tl.zeros([ROWS], tl.float32) + pivot)
        tl.store(ranks + j * rows + row, rank.to(tl.uint8), mask=here)
        tl.store(errors + j * rows + row, error, mask=here)
        if PUSH:
            tile = _without(tile, factor, j, error, size, down, right, SIZE)


@triton.jit
def descend_columns(
    gradient, current, hessian, levels, ranks, moved, size, rows, down, right, between, SIZE: tl.constexpr, ROWS: tl.constexpr
):
    """A program: ROWS rows of a group. down, right: strides of hessian. between: of levels, from row to row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    a, b, c, d = load_levels(levels, row.to(tl.int64) * between, here)
    tile = _load_columns(gradient, row, size, rows, SIZE)
    line = tl.arange(0, SIZE)[:, None]
    for j in range(size):
        slope = tl.sum(tl.where(line == j, tile, 0.0), 0)
        present = tl.load(current + j * rows + row, mask=here, other=0.0)
        pivot = tl.load(hessian + j * down + j * right)
        rank = nearest_rank(present + tl.div_rn(slope, tl.zeros([ROWS], tl.float32) + pivot), a, b, c, d)
        step = level_at(rank, a, b, c, d) - present
        tl.store(ranks + j * rows + row, rank.to(tl.uint8), mask=here)
        tl.store(moved + j * rows + row, step, mask=here)
        tile = _without(tile, hessian, j, step, size, down, right, SIZE)


@triton.jit
def _of_rank(number: tl.constexpr, tile, rank, hessian, ranks, row, here, size, rows, down, right, SIZE: tl.constexpr):
    """What a step of the level of a rank gains, and what it costs with each of the four: five of [n]."""
    line, spread = tl.arange(0, SIZE)[:, None], tl.zeros_like(tile)
    for j in range(size):
        member = tl.load(ranks + j * rows + row, mask=here, other=4) == number
        column = tl.load(hessian + line * down + j * right, mask=line < size, other=0.0)
        spread += tl.where(member[None, :], column, 0.0)
    slope = tl.sum(tl.where(rank == number, tile, 0.0), 0)
    first, second = tl.sum(tl.where(rank == 0, spread, 0.0), 0), tl.sum(tl.where(rank == 1, spread, 0.0), 0)
    third, fourth = tl.sum(tl.where(rank == 2, spread, 0.0), 0), tl.sum(tl.where(rank == 3, spread, 0.0), 0)
    return slope, first, second, third, fourth


@triton.jit
def descend_levels(
    gradient, hessian, levels, scale, ranks, moved, table, size, rows, down, right, between, apart, SIZE: tl.constexpr,
    ROWS: tl.constexpr
):  # fmt: skip
    """A program: ROWS rows of a group. down, right: strides of hessian. between, apart: of levels and scale, from row to row.
    table: see `best_of_table`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line, here = tl.arange(0, SIZE)[:, None], row < rows
    place, inside = line * rows + row[None, :], (line < size) & here[None, :]
    tile, rank = _load_columns(gradient, row, size, rows, SIZE), tl.load(ranks + place, mask=inside, other=4)
    unit = tl.load(scale + row.to(tl.int64) * apart, mask=here, other=1.0).to(tl.float32)
    e, aa, ab, ac, ad = _of_rank(0, tile, rank, hessian, ranks, row, here, size, rows, down, right, SIZE)
    f, _, bb, bc, bd = _of_rank(1, tile, rank, hessian, ranks, row, here, size, rows, down, right, SIZE)
    g, _, _, cc, cd = _of_rank(2, tile, rank, hessian, ranks, row, here, size, rows, down, right, SIZE)
    h, _, _, _, dd = _of_rank(3, tile, rank, hessian, ranks, row, here, size, rows, down, right, SIZE)
    at = row.to(tl.int64) * between
    a, b, c, d = load_levels(levels, at, here)
    known = a.to(tl.float32) * unit, b.to(tl.float32) * unit, c.to(tl.float32) * unit, d.to(tl.float32) * unit
    a, b, c, d = best_of_table(table, unit, (e, f, g, h), (aa, ab, ac, ad, bb, bc, bd, cc, cd, dd), known, ROWS)
    store_levels(levels, at, here, a.to(tl.int8), b.to(tl.int8), c.to(tl.int8), d.to(tl.int8))
    a, b, c, d = a * unit - known[0], b * unit - known[1], c * unit - known[2], d * unit - known[3]
    step = level_at(rank.to(tl.int32), a[None, :], b[None, :], c[None, :], d[None, :])
    tl.store(moved + place, step, mask=inside)


def _settings(block: Tensor, rows: int = ROWS) -> dict[str, int]:
    return {"SIZE": triton.next_power_of_2(len(block)), "ROWS": rows, "num_warps": 1}


@operator("compensate_columns(Tensor block, Tensor factor, Tensor levels, bool push, Tensor(a!) ranks, Tensor(b!) errors)")
def compensate(block: Tensor, factor: Tensor, levels: Tensor, push: bool, ranks: Tensor, errors: Tensor) -> None:
    """At most COLUMNS_MAX columns; see `StageKernels.compensate_columns`."""
    size, rows = block.shape
    compensate_columns[(triton.cdiv(rows, ROWS),)](
        block, factor, levels, ranks, errors, size, rows, *factor.stride(), levels.stride(0), PUSH=push, **_settings(block)
    )


@operator("descend_columns(Tensor gradient, Tensor current, Tensor hessian, Tensor levels, Tensor(a!) ranks, Tensor(b!) moved)")
def descend(gradient: Tensor, current: Tensor, hessian: Tensor, levels: Tensor, ranks: Tensor, moved: Tensor) -> None:
    """At most COLUMNS_MAX columns; see `StageKernels.descend_columns`."""
    size, rows = gradient.shape
    descend_columns[(triton.cdiv(rows, ROWS),)](
        gradient, current, hessian, levels, ranks, moved, size, rows, *hessian.stride(), levels.stride(0), **_settings(gradient)
    )


@operator("descend_levels(Tensor gradient, Tensor hessian, Tensor(a!) levels, Tensor scale, Tensor ranks, Tensor(b!) moved)")
def descend_of_levels(gradient: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor, ranks: Tensor, moved: Tensor) -> None:
    """At most COLUMNS_MAX columns; see `StageKernels.descend_levels`."""
    size, rows = gradient.shape
    descend_levels[(triton.cdiv(rows, LEVEL_ROWS),)](
        gradient, hessian, levels, scale, ranks, moved, table_of(scale.device, ascending=True, dtype=torch.float32), size, rows,
        *hessian.stride(), levels.stride(0), scale.stride(0), **_settings(gradient, LEVEL_ROWS),
    )  # fmt: skip
