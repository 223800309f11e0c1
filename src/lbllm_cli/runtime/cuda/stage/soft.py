"""The soft form of knee quantizers, `training.act_ste.soft_quantize`, and its gradients.

With size = |x| / step, a side's knee, steps and width, and r() for rounding, through which gradients pass:

    inner = min(r(size), knee)        outer = knee + width * min(max(r((size - knee) / width), 0), steps)
    x_hat = (mask * inner + (1 - mask) * outer) * step * sign(x),    mask = sigmoid((knee - size) / tau)

Where the two of a minimum are equal, each gets half, as in torch.
"""

import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.runtime.cuda.instructions import nearest_integer, product, rounded_to
from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.stage.groups import group_places
from lbllm_cli.runtime.cuda.stage.quantizers import best_candidate, grouping


@triton.jit
def _taken(x, high, low, lattice, factors, TABLES: tl.constexpr, PLACES: tl.constexpr):
    """The table of each group."""
    chosen = tl.zeros(high.shape, tl.int32)
    if TABLES > 1:
        _, _, chosen = best_candidate(x, high, low, lattice, factors, TABLES, PLACES)
    return chosen


@triton.jit
def _side(counts, ratio, clip, chosen, SIDE: tl.constexpr):
    """One side of each group's table, 0 below zero, 1 above it.

    Fine and coarse levels, ratio, reach, and the step where the extreme is 1, all [n].
    """
    fine, coarse = tl.load(counts + 4 * chosen + SIDE), tl.load(counts + 4 * chosen + 2 + SIDE)
    width = tl.load(ratio + 2 * chosen + SIDE)
    reach = fine + product(width, coarse)
    share = tl.div_rn(tl.load(clip + 2 * chosen + 1 - SIDE), tl.maximum(reach, 1e-9))
    return fine, coarse, width, reach, tl.where(reach > 0, share, 0.0)


@triton.jit
def _halved(a, b):
    """What the gradient of min(a, b) is times for a."""
    return tl.where(a < b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _values(place, below, above, tau):
    """Soft values in steps, and what gradients are made of.

    place: x / step, [n, size]. below, above: knee, steps and width of each side, tuples of [n]. Returns the value of |place|, its
    derivative, and that of the ratio, each [n, size].
    """
    negative, size = place < 0, tl.abs(place)
    knee = tl.where(negative, below[0][:, None], above[0][:, None])
    steps = tl.where(negative, below[1][:, None], above[1][:, None])
    width = tl.where(negative, below[2][:, None], above[2][:, None])
    whole = nearest_integer(size).to(tl.float32)
    inner = tl.minimum(whole, knee)
    beyond = tl.div_rn(size - knee, width)
    taken = nearest_integer(beyond).to(tl.float32)
    passing = tl.where(taken >= 0, _halved(tl.maximum(taken, 0.0), steps), 0.0)
    taken = tl.minimum(tl.maximum(taken, 0.0), steps)
    outer = knee + product(width, taken)
    mask = tl.sigmoid((knee - size) / tau)
    slope = mask * _halved(whole, knee) + (1 - mask) * passing - (inner - outer) * mask * (1 - mask) / tau
    return mask * inner + (1 - mask) * outer, slope, (1 - mask) * (taken - passing * beyond)


@triton.jit
def soft_values(
    x, lattice, factors, counts, ratio, clip, found, tau, groups, total, width,
    TABLES: tl.constexpr, PLACES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A program: GROUPS of `total` groups."""
    _, _, place, here = group_places(tl.program_id(0) * GROUPS, groups, total, width, SIZE, BLOCK, GROUPS)
    tile = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
    high, low = tl.maximum(tl.max(tile, 1), 0.0), tl.maximum(-tl.min(tile, 1), 0.0)
    chosen = _taken(tile, high, low, lattice, factors, TABLES, PLACES)
    fine_low, coarse_low, ratio_low, _, share_low = _side(counts, ratio, clip, chosen, 0)
    fine_high, coarse_high, ratio_high, _, share_high = _side(counts, ratio, clip, chosen, 1)
    step = tl.maximum(tl.maximum(share_low * low, share_high * high), 1e-30)[:, None]
    at = tl.div_rn(tile, tl.broadcast_to(step, tile.shape))
    value, _, _ = _values(at, (fine_low, coarse_low, ratio_low), (fine_high, coarse_high, ratio_high), tau)
    value = tl.where(at > 0, value, tl.where(at < 0, -value, 0.0)) * step
    tl.store(found + place, rounded_to(value, found.dtype.element_ty), mask=here)


@triton.jit
def soft_gradients(
    x, gradient, lattice, factors, counts, ratio, clip, passed, parts, tau, groups, total, width,
    TABLES: tl.constexpr, PLACES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A program: GROUPS of `total` groups. parts: [4 * tables, programs], of ratios, then of clipping factors."""
    _, _, place, here = group_places(tl.program_id(0) * GROUPS, groups, total, width, SIZE, BLOCK, GROUPS)
    tile = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
    high, low = tl.maximum(tl.max(tile, 1), 0.0), tl.maximum(-tl.min(tile, 1), 0.0)
    chosen = _taken(tile, high, low, lattice, factors, TABLES, PLACES)
    fine_low, coarse_low, ratio_low, reach_low, share_low = _side(counts, ratio, clip, chosen, 0)
    fine_high, coarse_high, ratio_high, reach_high, share_high = _side(counts, ratio, clip, chosen, 1)
    down, up = share_low * low, share_high * high
    step = tl.maximum(tl.maximum(down, up), 1e-30)
    at = tl.div_rn(tile, tl.broadcast_to(step[:, None], tile.shape))
    value, slope, by_ratio = _values(at, (fine_low, coarse_low, ratio_low), (fine_high, coarse_high, ratio_high), tau)
    given = tl.load(gradient + place, mask=here, other=0.0).to(tl.float32)
    given = tl.where(at == 0, 0.0, given)
    tl.store(passed + place, rounded_to(given * slope, passed.dtype.element_ty), mask=here)
    signed = tl.where(at < 0, -given, given)
    by_ratio *= signed * step[:, None]
    by_step = tl.sum(signed * value - given * slope * at, 1)
    by_step = tl.where(tl.maximum(down, up) >= 1e-30, by_step, 0.0)
    # A share is clip / reach, and reach is fine + ratio * coarse.
    by_low, by_high = by_step * low * _halved(up, down), by_step * high * _halved(down, up)
    clip_low = tl.where(reach_low > 0, by_low / tl.maximum(reach_low, 1e-9), 0.0)
    clip_high = tl.where(reach_high > 0, by_high / tl.maximum(reach_high, 1e-9), 0.0)
    by_low = tl.sum(tl.where(at < 0, by_ratio, 0.0), 1) - clip_low * share_low * coarse_low
    by_high = tl.sum(tl.where(at < 0, 0.0, by_ratio), 1) - clip_high * share_high * coarse_high
    number, programs = tl.program_id(0), tl.num_programs(0)
    for table in tl.static_range(TABLES):
        own, here = parts + number + 2 * table * programs, chosen == table
        tl.store(own, tl.sum(tl.where(here, by_low, 0.0), 0))
        tl.store(own + programs, tl.sum(tl.where(here, by_high, 0.0), 0))
        tl.store(own + 2 * TABLES * programs, tl.sum(tl.where(here, clip_high, 0.0), 0))
        tl.store(own + (2 * TABLES + 1) * programs, tl.sum(tl.where(here, clip_low, 0.0), 0))


_TABLES = "Tensor lattice, Tensor factors, int places, int size, Tensor counts, Tensor ratio, Tensor clip, float tau"


@operator(f"soft_values(Tensor x, {_TABLES}, Tensor(a!) found)")
def quantize(
    x: Tensor, lattice: Tensor, factors: Tensor, places: int, size: int, counts: Tensor, ratio: Tensor, clip: Tensor, tau: float,
    found: Tensor,
) -> None:  # fmt: skip
    """x, found: [rows, width]. lattice, factors, places: of a `QuantizerTables`; the rest as `StageKernels.soft_quantize`."""
    grid, settings = grouping(x, size)
    soft_values[grid](x, lattice, factors, counts, ratio, clip, found, tau, TABLES=len(counts), PLACES=places, **settings)


@operator(f"soft_gradients(Tensor x, Tensor gradient, {_TABLES}, Tensor(a!) passed, Tensor(b!) parts)")
def find_gradients(
    x: Tensor, gradient: Tensor, lattice: Tensor, factors: Tensor, places: int, size: int, counts: Tensor, ratio: Tensor,
    clip: Tensor, tau: float, passed: Tensor, parts: Tensor,
) -> None:  # fmt: skip
    """As `quantize`; gradient, passed: [rows, width]. parts: [4 * tables, programs of `grouping`]."""
    grid, settings = grouping(x, size)
    soft_gradients[grid](
        x, gradient, lattice, factors, counts, ratio, clip, passed, parts, tau, TABLES=len(counts), PLACES=places, **settings
    )
