"""The four levels of a group as kernels hold them: one tensor each, of whatever shape the groups of a program have."""

import triton
import triton.language as tl

from lbllm_cli.format.names import HALF_WIDTHS, MEANS

_MEANS, _HALF_WIDTHS = tl.constexpr(MEANS), tl.constexpr(HALF_WIDTHS)


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
def _nearest_pair(first, second, ENTRIES: tl.constexpr):
    """The entry that is nearest to each pair, the first one on a tie: floats of the shape of both."""
    x, y = tl.zeros(first.shape, tl.float32) + ENTRIES[0][0], tl.zeros(first.shape, tl.float32) + ENTRIES[0][1]
    least = (first - x) * (first - x) + (second - y) * (second - y)
    for place in tl.static_range(1, 16):
        off = first - ENTRIES[place][0], second - ENTRIES[place][1]
        distance = off[0] * off[0] + off[1] * off[1]
        x, y = tl.where(distance < least, ENTRIES[place][0], x), tl.where(distance < least, ENTRIES[place][1], y)
        least = tl.minimum(least, distance)
    return x, y


@triton.jit
def nearest_of_table(a, b, c, d, unit):
    """The four of the table that are nearest to ascending levels, in units of `unit`: `format.level_table.table_levels`."""
    a, b, c, d = tl.div_rn(a, unit), tl.div_rn(b, unit), tl.div_rn(c, unit), tl.div_rn(d, unit)
    inner, outer = _nearest_pair((b + c) * 0.5, (a + d) * 0.5, _MEANS)
    near, far = _nearest_pair((c - b) * 0.5, (d - a) * 0.5, _HALF_WIDTHS)
    return outer - far, inner - near, inner + near, outer + far


@triton.jit
def best_of_table(table, unit, b, c, known, ROWS: tl.constexpr):
    """`ptq.table_choice.best_of_table` about present levels: the four with the least  v C v - 2 b v  of the steps v to them, in
    units of `unit`.

    table: of levels by rank, float32 [256, 4]. known: present levels, four of [ROWS], in weight units. b: four of [ROWS]. c: ten,
    C[0, 0], C[0, 1] and so on row by row, without what lies below the diagonal.
    """
    mean, best = tl.arange(0, 16)[None, :], tl.full([ROWS, 16], float("inf"), tl.float32)
    at = tl.zeros([ROWS, 16], tl.int32)
    for half in range(16):
        place = table + (half * 16 + mean) * 4
        w = tl.load(place) * unit[:, None] - known[0][:, None]
        x = tl.load(place + 1) * unit[:, None] - known[1][:, None]
        y = tl.load(place + 2) * unit[:, None] - known[2][:, None]
        z = tl.load(place + 3) * unit[:, None] - known[3][:, None]
        cost = w * (w * c[0][:, None] + 2 * (x * c[1][:, None] + y * c[2][:, None] + z * c[3][:, None] - b[0][:, None]))
        cost += x * (x * c[4][:, None] + 2 * (y * c[5][:, None] + z * c[6][:, None] - b[1][:, None]))
        cost += y * (y * c[7][:, None] + 2 * (z * c[8][:, None] - b[2][:, None])) + z * (z * c[9][:, None] - 2 * b[3][:, None])
        at = tl.where(cost < best, half, at)
        best = tl.minimum(best, cost)
    # Of equally good ones the first, as in torch: with levels that no weight has there are some.
    least = tl.min(best, 1)
    place = table + tl.min(tl.where(best == least[:, None], at * 16 + mean, 255), 1) * 4
    return tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)


@triton.jit
def sums_at(index, x):
    """Sums along the second axis over the values of each number, 0 to 3: x float32 [n, size] -> four of [n]."""
    a, b = tl.sum(tl.where(index == 0, x, 0.0), 1), tl.sum(tl.where(index == 1, x, 0.0), 1)
    return a, b, tl.sum(tl.where(index == 2, x, 0.0), 1), tl.sum(tl.where(index == 3, x, 0.0), 1)
