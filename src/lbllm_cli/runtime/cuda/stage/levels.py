"""The four levels of a group as kernels hold them: one tensor each, of whatever shape the groups of a program have."""

import triton
import triton.language as tl

from lbllm_cli.format.names import TABLE_LEVELS

_INNER, _OUTER = (tl.constexpr(row) for row in TABLE_LEVELS)


@triton.jit
def load_levels(levels, at, here):
    """Four neighbours from levels[at] on, float32, 0 where not `here`: at, here [n] -> four of [n]."""
    a, b = tl.load(levels + at, mask=here, other=0.0), tl.load(levels + at + 1, mask=here, other=0.0)
    return a, b, tl.load(levels + at + 2, mask=here, other=0.0), tl.load(levels + at + 3, mask=here, other=0.0)


@triton.jit
def store_levels(levels, at, here, a, b, c, d):
    """Inverse of `load_levels`."""
    tl.store(levels + at, a, mask=here)
    tl.store(levels + at + 1, b, mask=here)
    tl.store(levels + at + 2, c, mask=here)
    tl.store(levels + at + 3, d, mask=here)


@triton.jit
def nearest_rank(x, a, b, c, d):
    """Rank of the nearest of four ascending levels, the lower one on a tie: int32, of x's shape."""
    rank = (x > (a + b) * 0.5).to(tl.int32)
    return rank + (x > (b + c) * 0.5).to(tl.int32) + (x > (c + d) * 0.5).to(tl.int32)


@triton.jit
def level_at(index, a, b, c, d):
    """The level of each number, 0 to 3."""
    return tl.where(index < 2, tl.where(index == 0, a, b), tl.where(index == 2, c, d))


@triton.jit
def nearest_value(level, unit, RANK: tl.constexpr):
    """The value of a rank's table that is nearest to a level, as a float: `format.level_table.table_levels`."""
    sign: tl.constexpr = -1 if RANK < 2 else 1
    table: tl.constexpr = _INNER if RANK == 1 or RANK == 2 else _OUTER
    size = level * sign
    value = tl.full(level.shape, table[0], tl.float32)
    for place in tl.static_range(1, 4):
        value += tl.where(size > unit * ((table[place - 1] + table[place]) / 2), table[place] - table[place - 1], 0.0)
    return value * sign


@triton.jit
def sums_at(index, x):
    """Sums along the second axis over the values of each number, 0 to 3: x float32 [n, size] -> four of [n]."""
    a, b = tl.sum(tl.where(index == 0, x, 0.0), 1), tl.sum(tl.where(index == 1, x, 0.0), 1)
    return a, b, tl.sum(tl.where(index == 2, x, 0.0), 1), tl.sum(tl.where(index == 3, x, 0.0), 1)
