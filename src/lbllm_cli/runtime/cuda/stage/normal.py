"""Normal equations of the levels of every row: S H S^T and S H w, S the 0/1 matrix that says which weight uses which level.

H is taken as three bfloat16 numbers that are together what it is in float32: products with 0 and 1 are exact, and tensor cores
sum them in float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.format.weights import group_count
from lbllm_cli.runtime.cuda.instructions import multiply_add, rounded_to
from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.stage.groups import group_places, pair_below, tiling
from lbllm_cli.runtime.cuda.stage.levels import store_levels, sums_at

# Rows of a program: with four levels each they fill the 128 columns of a product.
ROWS = 32
# Columns of H that are multiplied at once, at most.
_DOWN, _ALONG = 128, 32
# Of what lies outside a group: no level's number.
_NONE = tl.constexpr(4)


@triton.jit
def _spread_ranks(ranks, column, row, here, rows, width):
    """Ranks of some columns, each row's as often as it has levels: column [n, 1], row [1, m] -> int32 [n, m]."""
    return tl.load(ranks + row.to(tl.int64) * width + column, mask=here & (row < rows), other=_NONE).to(tl.int32)


@triton.jit
def gram_of_levels(
    ranks, hessian, gram, rows, width, unknowns, blocks,
    SIZE: tl.constexpr, DOWN: tl.constexpr, ALONG: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program: the 4 x 4 entries of a pair of groups, of ROWS rows. blocks: of rows. SIZE: columns of a group."""
    g, h = pair_below(tl.program_id(0) // blocks)
    at = tl.arange(0, 4 * ROWS)
    row, level = (tl.program_id(0) % blocks * ROWS + at // 4)[None, :], (at % 4)[None, :]
    a, b = tl.zeros([4 * ROWS], tl.float32), tl.zeros([4 * ROWS], tl.float32)
    c, d = tl.zeros([4 * ROWS], tl.float32), tl.zeros([4 * ROWS], tl.float32)
    for top in range(0, SIZE, DOWN):
        i = top + tl.arange(0, DOWN)[:, None]
        inside = (i < SIZE) & (g * SIZE + i < width)
        total = tl.zeros([DOWN, 4 * ROWS], tl.float32)
        for left in range(0, SIZE, ALONG):
            j = left + tl.arange(0, ALONG)
            known = (j < SIZE) & (h * SIZE + j < width)
            place = (g * SIZE + i).to(tl.int64) * width + h * SIZE + j[None, :]
            exact = tl.load(hessian + place, mask=inside & known[None, :], other=0.0)
            first = rounded_to(exact, tl.bfloat16)
            rest = exact - first.to(tl.float32)
            second = rounded_to(rest, tl.bfloat16)
            third = rounded_to(rest - second.to(tl.float32), tl.bfloat16)
            used = _spread_ranks(ranks, h * SIZE + j[:, None], row, known[:, None], rows, width) == level
            used = tl.where(used, 1.0, 0.0).to(tl.bfloat16)
            total = multiply_add(first, used, multiply_add(second, used, multiply_add(third, used, total)))
        own = _spread_ranks(ranks, g * SIZE + i, row, inside, rows, width)
        a += tl.sum(tl.where(own == 0, total, 0.0), 0)
        b += tl.sum(tl.where(own == 1, total, 0.0), 0)
        c += tl.sum(tl.where(own == 2, total, 0.0), 0)
        d += tl.sum(tl.where(own == 3, total, 0.0), 0)
    row, level = tl.program_id(0) % blocks * ROWS + at // 4, at % 4
    found, here = gram + row.to(tl.int64) * unknowns * unknowns + (4 * g * unknowns + 4 * h + level), row < rows
    tl.store(found, a, mask=here)
    tl.store(found + unknowns, b, mask=here)
    tl.store(found + 2 * unknowns, c, mask=here)
    tl.store(found + 3 * unknowns, d, mask=here)


@triton.jit
def rank_sums(values, ranks, sums, groups, total, width, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """A program: GROUPS of `total` groups; see `group_places`."""
    group, _, place, here = group_places(tl.program_id(0) * GROUPS, groups, total, width, SIZE, BLOCK, GROUPS)
    rank = tl.load(ranks + place, mask=here, other=_NONE).to(tl.int32)
    a, b, c, d = sums_at(rank, tl.load(values + place, mask=here, other=0.0))
    store_levels(sums, group.to(tl.int64) * 4, group < total, a, b, c, d)


def gram_tile(size: int) -> dict[str, int]:
    """Constants of a program for groups of `size`: 128 -> H in pieces of 128 x 32, 32 rows."""
    block = max(16, triton.next_power_of_2(size))
    return {"SIZE": size, "DOWN": min(block, _DOWN), "ALONG": min(block, _ALONG), "ROWS": ROWS}


@operator("gram_of_levels(Tensor ranks, Tensor hessian, int group_size, Tensor(a!) gram)")
def fill_gram(ranks: Tensor, hessian: Tensor, group_size: int, gram: Tensor) -> None:
    """gram: [rows, u, u], u = 4 * groups, written in the blocks of groups on and below the diagonal."""
    rows, width = ranks.shape
    groups, blocks = group_count(width, group_size), triton.cdiv(rows, ROWS)
    gram_of_levels[(groups * (groups + 1) // 2 * blocks,)](
        ranks, hessian, gram, rows, width, 4 * groups, blocks, **gram_tile(group_size), num_warps=8
    )


@operator("rank_sums(Tensor values, Tensor ranks, int group_size, Tensor(a!) sums)")
def sum_ranks(values: Tensor, ranks: Tensor, group_size: int, sums: Tensor) -> None:
    """Sums over the columns of each rank: values [rows, in] -> [rows, 4 * groups]."""
    rows, width = ranks.shape
    grid, settings = tiling((rows, group_count(width, group_size), group_size), width)
    rank_sums[grid](values, ranks, sums, **settings)
