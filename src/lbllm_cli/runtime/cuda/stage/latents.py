"""Latent weights and the levels that they choose, one pass over memory each: forward, backward, optimizer step.

A program takes some whole groups of a weight. Latents are padded at a ragged end, weights and gradients are not.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.format.levels import level_max
from lbllm_cli.runtime.cuda.instructions import nearest_integer, product, rounded_to
from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.stage.groups import group_places, tiling
from lbllm_cli.runtime.cuda.stage.levels import level_at, load_levels, nearest_of_table, nearest_rank, store_levels, sums_at

# Groups of a program that rounds levels.
_GROUPS = 256
_BETA1, _BETA2, _EPSILON = tl.constexpr(0.9), tl.constexpr(0.95), tl.constexpr(1e-8)
_LOG_BETA1, _LOG_BETA2 = tl.constexpr(math.log2(0.9)), tl.constexpr(math.log2(0.95))


@triton.jit
def _larger(a, b):
    return tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _stored(level, scale, divisor, MOST: tl.constexpr):
    place = nearest_integer(tl.div_rn(level, divisor))
    return product(tl.minimum(tl.maximum(place, -MOST), MOST).to(tl.float32), scale)


@triton.jit
def _miss(level, scale, divisor):
    miss = _stored(level, scale, divisor, 7) - level
    # Rounded by itself, as in torch: fused with the sum it would choose another scale at a near tie.
    return product(miss, miss)


@triton.jit
def _fine_scale(largest, BLOCK: tl.constexpr):
    """`format.levels._fine_grid`'s."""
    wanted = tl.div_rn(largest, tl.full([BLOCK], 127.0, tl.float32))
    scale = wanted.to(tl.float16)
    # Of a float16 that is not negative, the number of its bits is its place among them.
    up = (scale.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    return tl.where(scale.to(tl.float32) < wanted * (1 - 2e-6), up, scale).to(tl.float32)


@triton.jit
def _coarse_scale(largest, a, b, c, d, BLOCK: tl.constexpr):
    """`format.levels._coarse_grid`'s, in the same order: 7.2, 7, 6.8, 6.2 and so on to 4.8."""
    best = tl.div_rn(largest, tl.full([BLOCK], 7.2, tl.float32)).to(tl.float16).to(tl.float32)
    divisor = tl.where(best == 0, 1.0, best)
    least = (_miss(a, best, divisor) + _miss(b, best, divisor)) + (_miss(c, best, divisor) + _miss(d, best, divisor))
    for place in tl.static_range(1, 9):
        top = tl.full([BLOCK], 7.0 - place // 3 + 0.2 * (1 - place % 3), tl.float32)
        scale = tl.div_rn(largest, top).to(tl.float16).to(tl.float32)
        divisor = tl.where(scale == 0, 1.0, scale)
        error = (_miss(a, scale, divisor) + _miss(b, scale, divisor)) + (_miss(c, scale, divisor) + _miss(d, scale, divisor))
        better = error < least
        best, least = tl.where(better, scale, best), tl.where(better, error, least)
    return best


@triton.jit
def stored_levels(levels, found, total, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """A program: BLOCK of `total` groups. `format.levels.stored_grid` and `level_values`. MOST: the largest stored level."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = group < total
    a, b, c, d = load_levels(levels, group.to(tl.int64) * 4, here)
    largest = _larger(_larger(a, b), _larger(c, d))
    scale = _fine_scale(largest, BLOCK) if MOST == 127 else _coarse_scale(largest, a, b, c, d, BLOCK)
    divisor = tl.where(scale == 0, 1.0, scale)
    a, b = _stored(a, scale, divisor, MOST), _stored(b, scale, divisor, MOST)
    c, d = _stored(c, scale, divisor, MOST), _stored(d, scale, divisor, MOST)
    store_levels(found, group.to(tl.int64) * 4, here, a, b, c, d)


@triton.jit
def _of_unit(place, level, unit, TYPE: tl.constexpr):
    # As a float, a level that is not finite stays so.
    return place.to(TYPE) if tl.int8 == TYPE else place * unit + (level - level)


@triton.jit
def table_levels(levels, scale, found, groups, total, ASCENDING: tl.constexpr, BLOCK: tl.constexpr):
    """A program: BLOCK of `total` groups, `groups` to a row. `format.level_table.table_levels`; floats are times the scale."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = group < total
    a, b, c, d = load_levels(levels, group.to(tl.int64) * 4, here)
    unit = tl.load(scale + group // groups, mask=here, other=1.0).to(tl.float32)
    TYPE: tl.constexpr = found.dtype.element_ty
    if ASCENDING:
        w, x, y, z = nearest_of_table(a, b, c, d, unit)
    else:
        y, w, x, z = nearest_of_table(c, a, b, d, unit)
    a, b = _of_unit(w, a, unit, TYPE), _of_unit(x, b, unit, TYPE)
    c, d = _of_unit(y, c, unit, TYPE), _of_unit(z, d, unit, TYPE)
    store_levels(found, group.to(tl.int64) * 4, here, a, b, c, d)


@triton.jit
def _ranks(latent, a, b, c, d):
    return nearest_rank(latent, a[:, None], b[:, None], c[:, None], d[:, None])


@triton.jit
def nearest_levels(latent, levels, weight, groups, total, width, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """A program: GROUPS of `total` groups; see `group_places`."""
    group, padded, place, here = group_places(tl.program_id(0) * GROUPS, groups, total, width, SIZE, BLOCK, GROUPS)
    a, b, c, d = load_levels(levels, group.to(tl.int64) * 4, group < total)
    rank = _ranks(tl.load(latent + padded, mask=here, other=0.0), a, b, c, d)
    value = level_at(rank, a[:, None], b[:, None], c[:, None], d[:, None])
    tl.store(weight + place, rounded_to(value, weight.dtype.element_ty), mask=here)


@triton.jit
def level_sums(
    gradient, latent, levels, sums, squares, groups, total, width, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr
):
    """A program: GROUPS of `total` groups, and one of the squares."""
    group, padded, place, here = group_places(tl.program_id(0) * GROUPS, groups, total, width, SIZE, BLOCK, GROUPS)
    known = group < total
    a, b, c, d = load_levels(levels, group.to(tl.int64) * 4, known)
    rank = _ranks(tl.load(latent + padded, mask=here, other=0.0), a, b, c, d)
    slope = tl.load(gradient + place, mask=here, other=0.0).to(tl.float32)
    a, b, c, d = sums_at(rank, slope)
    store_levels(sums, group.to(tl.int64) * 4, known, a, b, c, d)
    tl.store(squares + tl.program_id(0), tl.sum(tl.sum(slope * slope, 1), 0))


@triton.jit
def latent_step(
    latent, mean, square, step, gradient, levels, factor, skipped, rate, dampening, groups, total, width,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A program: GROUPS of `total` groups. mean, square: moments of the gradient."""
    if tl.load(skipped) == 0.0:
        group, padded, place, here = group_places(tl.program_id(0) * GROUPS, groups, total, width, SIZE, BLOCK, GROUPS)
        a, b, c, d = load_levels(levels, group.to(tl.int64) * 4, group < total)
        x = tl.load(latent + padded, mask=here, other=0.0)
        slope = tl.load(gradient + place, mask=here, other=0.0).to(tl.float32) * tl.load(factor)
        first = tl.load(mean + padded, mask=here, other=0.0) * _BETA1 + slope * (1 - _BETA1)
        second = tl.load(square + padded, mask=here, other=0.0) * _BETA2 + slope * slope * (1 - _BETA2)
        # In float64: of the first steps' corrections little is left beside the 1.
        number = tl.load(step).to(tl.float64)
        length = (rate / (1.0 - tl.exp2(number * _LOG_BETA1))).to(tl.float32)
        correction = (1.0 / tl.sqrt(1.0 - tl.exp2(number * _LOG_BETA2))).to(tl.float32)
        moved = x - length * first / (tl.sqrt(second) * correction + _EPSILON)
        level = level_at(_ranks(x, a, b, c, d), a[:, None], b[:, None], c[:, None], d[:, None])
        tl.store(latent + padded, moved + dampening * (level - moved), mask=here)
        tl.store(mean + padded, first, mask=here)
        tl.store(square + padded, second, mask=here)


@operator("stored_levels(Tensor levels, Tensor(a!) found, int level_bits)")
def store(levels: Tensor, found: Tensor, level_bits: int) -> None:
    """See `StageKernels.stored_levels`."""
    total = levels.numel() // 4
    stored_levels[(triton.cdiv(total, _GROUPS),)](levels, found, total, MOST=level_max(level_bits), BLOCK=_GROUPS)


@operator("table_levels(Tensor levels, Tensor scale, Tensor(a!) found, bool ascending)")
def store_on_table(levels: Tensor, scale: Tensor, found: Tensor, ascending: bool) -> None:
    """See `StageKernels.table_levels`."""
    total, groups = levels.numel() // 4, levels.shape[-2]
    grid = (triton.cdiv(total, _GROUPS),)
    table_levels[grid](levels, scale, found, groups, total, ASCENDING=ascending, BLOCK=_GROUPS)


@operator("nearest_levels(Tensor latent, Tensor levels, Tensor(a!) weight)")
def nearest(latent: Tensor, levels: Tensor, weight: Tensor) -> None:
    """See `StageKernels.nearest`."""
    grid, settings = tiling(latent.shape, weight.shape[1])
    nearest_levels[grid](latent, levels, weight, **settings)


@operator("level_sums(Tensor gradient, Tensor latent, Tensor levels, Tensor(a!) sums, Tensor(b!) squares)")
def sum_levels(gradient: Tensor, latent: Tensor, levels: Tensor, sums: Tensor, squares: Tensor) -> None:
    """squares: of each program, [programs of `tiling`]; the rest as `StageKernels.nearest_sums`."""
    grid, settings = tiling(latent.shape, gradient.shape[1])
    level_sums[grid](gradient, latent, levels, sums, squares, **settings)


@operator(
    "latent_step(Tensor(a!) latent, Tensor(b!) mean, Tensor(c!) square, Tensor step, Tensor gradient, Tensor levels,"
    " Tensor factor, Tensor skipped, float rate, float dampening)"
)
def step_latents(
    latent: Tensor, mean: Tensor, square: Tensor, step: Tensor, gradient: Tensor, levels: Tensor, factor: Tensor, skipped: Tensor,
    rate: float, dampening: float,
) -> None:  # fmt: skip
    """See `StageKernels.latent_step`."""
    grid, settings = tiling(latent.shape, gradient.shape[1])
    latent_step[grid](latent, mean, square, step, gradient, levels, factor, skipped, rate, dampening, **settings)


def squares_of(latent: Tensor) -> Tensor:
    """Room for the squares of `sum_levels`."""
    return torch.empty(tiling(latent.shape, 1)[0], device=latent.device)
