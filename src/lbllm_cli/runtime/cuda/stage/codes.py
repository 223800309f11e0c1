"""Weights whose codes are packed: their values, and gradients of the levels."""

import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.runtime.cuda.instructions import rounded_to
from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.stage.groups import group_places, tiling
from lbllm_cli.runtime.cuda.stage.levels import level_at, load_levels, store_levels, sums_at


@triton.jit
def _codes(codes, group, here, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Codes of some groups, 0 to 3: int32 [groups, BLOCK]."""
    within = tl.arange(0, BLOCK)[None, :]
    quads = tl.load(codes + group.to(tl.int64)[:, None] * (SIZE // 4) + within // 4, mask=here, other=0).to(tl.int32)
    return (quads >> (within % 4 * 2)) & 3


@triton.jit
def decoded_weight(codes, levels, weight, groups, total, width, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """A program: GROUPS of `total` groups; see `group_places`."""
    group, _, place, here = group_places(tl.program_id(0) * GROUPS, groups, total, width, SIZE, BLOCK, GROUPS)
    a, b, c, d = load_levels(levels, group.to(tl.int64) * 4, group < total)
    value = level_at(_codes(codes, group, here, SIZE, BLOCK), a[:, None], b[:, None], c[:, None], d[:, None])
    tl.store(weight + place, rounded_to(value, weight.dtype.element_ty), mask=here)


@triton.jit
def code_sums(gradient, codes, sums, groups, total, width, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """A program: GROUPS of `total` groups."""
    group, _, place, here = group_places(tl.program_id(0) * GROUPS, groups, total, width, SIZE, BLOCK, GROUPS)
    slope = tl.load(gradient + place, mask=here, other=0.0).to(tl.float32)
    a, b, c, d = sums_at(_codes(codes, group, here, SIZE, BLOCK), slope)
    store_levels(sums, group.to(tl.int64) * 4, group < total, a, b, c, d)


@operator("decoded_weight(Tensor codes, Tensor levels, Tensor(a!) weight)")
def decode(codes: Tensor, levels: Tensor, weight: Tensor) -> None:
    """See `StageKernels.decoded`."""
    out, groups, quads = codes.shape
    grid, settings = tiling((out, groups, quads * 4), weight.shape[1])
    decoded_weight[grid](codes, levels, weight, **settings)


@operator("code_sums(Tensor gradient, Tensor codes, Tensor(a!) sums)")
def sum_codes(gradient: Tensor, codes: Tensor, sums: Tensor) -> None:
    """See `StageKernels.code_sums`."""
    out, groups, quads = codes.shape
    grid, settings = tiling((out, groups, quads * 4), gradient.shape[1])
    code_sums[grid](gradient, codes, sums, **settings)
