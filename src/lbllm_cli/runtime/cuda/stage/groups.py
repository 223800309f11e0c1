"""How groups of a weight, and pairs of them, are dealt out to programs."""

from collections.abc import Sequence

import triton
import triton.language as tl

# Weights of a program.
_TILE = 2048


@triton.jit
def group_places(first, groups, total, width, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """Where GROUPS groups of a weight [out, width] lie, from the group `first` of all `total` on.

    groups: of a row. SIZE: columns of a group; BLOCK: the same, up to a power of two. Returns the groups' numbers [GROUPS], and
    [GROUPS, BLOCK]: places in [out, groups, SIZE], int64, in [out, width], int64, and whether there is a weight.
    """
    group, within = first + tl.arange(0, GROUPS), tl.arange(0, BLOCK)[None, :]
    column = (group % groups * SIZE)[:, None] + within
    here = (group < total)[:, None] & (within < SIZE) & (column < width)
    return group, group.to(tl.int64)[:, None] * SIZE + within, (group // groups).to(tl.int64)[:, None] * width + column, here


@triton.jit
def pair_below(number):
    """The pairs i >= j by number, (0, 0), (1, 0), (1, 1), (2, 0), ...: int32 -> i, j."""
    # A root that is rounded may be off by one.
    i = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
    return i, number - i * (i + 1) // 2


def tiling(shape: Sequence[int], width: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and arguments of a kernel over a weight [out, width]. shape: out, groups of a row, columns of a group."""
    out, groups, size = shape
    block = triton.next_power_of_2(size)
    count = max(1, _TILE // block)
    settings = {"groups": groups, "total": out * groups, "width": width, "SIZE": size, "BLOCK": block, "GROUPS": count}
    return (triton.cdiv(out * groups, count),), settings
