"""Activation quantizers in training: their tables made ready in one launch, and the gradients of `training.act_ste.FakeQuantize`.

Gradients quantize once more instead of reading what was found on the way there. Sums over everything are sums of each program's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.format.activations import Tables
from lbllm_cli.format.names import LATTICE_MAX
from lbllm_cli.runtime.cuda.activations import TYPES, QuantizerTables
from lbllm_cli.runtime.cuda.instructions import nearest_integer, product, rounded_to
from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.stage.groups import group_places

# Values of a program where steps are of groups.
_TILE = 1024


@triton.jit
def quantizer_tables(levels, zero, clip, lattice, factors, CODES: tl.constexpr, PLACES: tl.constexpr):
    """A program: one table, as `QuantizerTables` has it."""
    table = tl.program_id(0)
    own, place = levels + table * CODES, tl.arange(0, PLACES)
    nearest = tl.zeros([PLACES], tl.int32)
    for start in range(0, CODES, 16):
        code = start + tl.arange(0, 16)
        between = code < CODES - 1
        lower = tl.load(own + code, mask=between, other=0).to(tl.int32)
        middle = lower + tl.load(own + code + 1, mask=between, other=0).to(tl.int32)
        nearest += tl.sum((between[None, :] & (middle[None, :] < 2 * place[:, None])).to(tl.int32), 1)
    below = tl.load(zero + table).to(tl.int32)
    at_zero = tl.load(own + nearest).to(tl.int32) - below
    tl.store(lattice + table * PLACES + place, at_zero.to(lattice.dtype.element_ty))
    top = tl.load(own + CODES - 1).to(tl.int32)
    # One side of each pair, in its place: what is reached above and below zero, Z, and the last T.
    side = tl.arange(0, 2)
    reach = tl.where(side == 0, top - below, below).to(tl.float32)
    shares = tl.div_rn(tl.load(clip + table * 2 + side), tl.maximum(reach, 1.0))
    tl.store(factors + table * 4 + side, tl.where(reach > 0, shares, 0.0))
    tl.store(factors + table * 4 + 2 + side, tl.where(side == 0, below, top).to(tl.float32))


@triton.jit
def reciprocal(step):
    """`format.activations.reciprocal`: [n]."""
    return tl.where(step > 1e-30, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step), 0.0)


@triton.jit
def lattice_values(x, inverse, lattice, zero, top):
    """T - Z of the level nearest to each value: x [n, size], inverse [n], the rest scalars or [n, 1]."""
    place = nearest_integer(product(x, inverse[:, None])) + zero
    return tl.load(lattice + tl.minimum(tl.maximum(place, 0), top)).to(tl.float32)


@triton.jit
def refitted(x, values):
    """The best step for T - Z that were chosen: [n, size] -> [n]."""
    return tl.div_rn(tl.sum(x * values, 1), tl.maximum(tl.sum(values * values, 1), 1.0))


@triton.jit
def squared_error(x, values, step):
    """[n, size], [n, size], [n] -> [n]."""
    off = values * step[:, None] - x
    return tl.sum(off * off, 1)


@triton.jit
def candidate(x, high, low, lattice, factors, SHARE: tl.constexpr):
    """One table with a share of its reach: x [n, size], its extremes [n] -> 1 / step that codes are chosen with, step, error."""
    zero, top = tl.load(factors + 2).to(tl.int32), tl.load(factors + 3).to(tl.int32)
    tried = tl.maximum(product(high, tl.load(factors)), product(low, tl.load(factors + 1)))
    inverse = reciprocal(product(tried, tl.full(tried.shape, SHARE, tl.float32)))
    values = lattice_values(x, inverse, lattice, zero, top)
    step = refitted(x, values)
    return inverse, step, squared_error(x, values, step)


@triton.jit
def best_candidate(x, high, low, lattice, factors, TABLES: tl.constexpr, PLACES: tl.constexpr):
    """What each group takes, as `format.activations` chooses: 1 / step that codes are chosen with, step and table, all [n]."""
    inverse, step, least = candidate(x, high, low, lattice, factors, 1.0)
    chosen = tl.zeros(high.shape, tl.int32)
    for number in tl.static_range(1, 2 * TABLES):
        own, shares = lattice + PLACES * (number // 2), factors + 4 * (number // 2)
        tried, refit, error = candidate(x, high, low, own, shares, 1.0 if number % 2 == 0 else 0.88)
        better = error < least
        least, chosen = tl.where(better, error, least), tl.where(better, number // 2, chosen)
        inverse, step = tl.where(better, tried, inverse), tl.where(better, refit, step)
    return inverse, step, chosen


@triton.jit
def _uniform(x, high, low, factors, TOP: tl.constexpr):
    """T - Z, step, and Z of each group in the uniform form."""
    up, down = product(high, tl.load(factors)), product(low, tl.load(factors + 1))
    inverse = reciprocal(tl.div_rn(up + down, tl.full(up.shape, TOP, tl.float32)))
    zero = tl.minimum(tl.maximum(nearest_integer(product(down, inverse)), 0), TOP)
    code = nearest_integer(product(x, inverse[:, None])) + zero[:, None]
    values = (tl.minimum(tl.maximum(code, 0), TOP) - zero[:, None]).to(tl.float32)
    return values, refitted(x, values), zero


@triton.jit
def _store_knee_parts(parts, number, stride, sums, high, low, chosen, factors, clip, TABLES: tl.constexpr):
    """One step serves both sides: what a group gives goes to the factor of the side that sets it."""
    up, down = product(high, tl.load(factors + 4 * chosen)), product(low, tl.load(factors + 4 * chosen + 1))
    factor = 2 * chosen + (down > up).to(tl.int32)
    for index in tl.static_range(2 * TABLES):
        total = tl.sum(tl.where(factor == index, sums, 0.0), 0)
        tl.store(parts + index * stride + number, total / tl.load(clip + index))


@triton.jit
def _store_uniform_parts(parts, number, stride, inner, over, under, high, low, clip):
    """A clipped value follows the factor of its side alone, an inner one the sum of both."""
    above, below = tl.load(clip), tl.load(clip + 1)
    shared = inner / tl.maximum(high * above + low * below, 1e-30)
    tl.store(parts + number, tl.sum(shared * high + over / above, 0))
    tl.store(parts + stride + number, tl.sum(shared * low + under / below, 0))


@triton.jit
def fake_gradients(
    x, gradient, lattice, factors, clip, passed, parts, groups, total, width,
    TABLES: tl.constexpr, PLACES: tl.constexpr, STEP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, INPUTS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """A program: GROUPS of `total` groups. passed: gradient of x; parts: [factors, programs]; each where it is wanted."""
    _, _, place, here = group_places(tl.program_id(0) * GROUPS, groups, total, width, SIZE, BLOCK, GROUPS)
    tile = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
    high, low = tl.maximum(tl.max(tile, 1), 0.0), tl.maximum(-tl.min(tile, 1), 0.0)
    if TABLES == 0:
        values, step, zero = _uniform(tile, high, low, factors, PLACES - 1)
        zero, top = zero[:, None], PLACES - 1
    else:
        inverse, step, chosen = best_candidate(tile, high, low, lattice, factors, TABLES, PLACES)
        zero = tl.load(factors + 4 * chosen + 2).to(tl.int32)[:, None]
        top = tl.load(factors + 4 * chosen + 3).to(tl.int32)[:, None]
        values = lattice_values(tile, inverse, lattice + (PLACES * chosen)[:, None], zero, top)
    step = rounded_to(step, STEP).to(tl.float32)
    at = product(tile, reciprocal(step)[:, None]) + zero.to(tl.float32)
    over, under = at > top + 0.5, at < -0.5
    slope = tl.load(gradient + place, mask=here, other=0.0).to(tl.float32)
    if INPUTS:
        tl.store(passed + place, rounded_to(tl.where(over | under, 0.0, slope), passed.dtype.element_ty), mask=here)
    if SUMS:
        values *= step[:, None]
        number, programs = tl.program_id(0), tl.num_programs(0)
        if TABLES == 0:
            inner = tl.sum(tl.where(over | under, 0.0, slope * (values - tile)), 1)
            above, below = tl.sum(tl.where(over, slope * values, 0.0), 1), tl.sum(tl.where(under, slope * values, 0.0), 1)
            _store_uniform_parts(parts, number, programs, inner, above, below, high, low, clip)
        else:
            sums = tl.sum(slope * tl.where(over | under, values, values - tile), 1)
            _store_knee_parts(parts, number, programs, sums, high, low, chosen, factors, clip, TABLES)


def grouping(x: Tensor, size: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and arguments of a kernel over all groups of x [rows, width]; size: values that share a step."""
    rows, width = x.shape
    size = min(size, width)
    groups, block = -(-width // size), triton.next_power_of_2(size)
    count = max(1, _TILE // block)
    # 8 values a thread, so long as there are threads: a row that shares a step is one program's.
    settings = {"groups": groups, "total": rows * groups, "width": width, "SIZE": size, "BLOCK": block, "GROUPS": count}
    return (triton.cdiv(rows * groups, count),), settings | {"num_warps": min(max(count * block // 256, 4), 32)}


@operator("quantizer_tables(Tensor levels, Tensor zero, Tensor clip, Tensor(a!) lattice, Tensor(b!) factors)")
def _prepare(levels: Tensor, zero: Tensor, clip: Tensor, lattice: Tensor, factors: Tensor) -> None:
    quantizer_tables[(len(levels),)](levels, zero, clip, lattice, factors, CODES=levels.shape[1], PLACES=lattice.shape[1])


@operator(
    "fake_gradients(Tensor x, Tensor gradient, Tensor lattice, Tensor factors, Tensor clip, int tables, int places, int size,"
    " ScalarType step_dtype, Tensor(a!)? passed, Tensor(b!)? parts)"
)
def find_gradients(
    x: Tensor, gradient: Tensor, lattice: Tensor, factors: Tensor, clip: Tensor, tables: int, places: int, size: int,
    step_dtype: torch.dtype, passed: Tensor | None, parts: Tensor | None,
) -> None:  # fmt: skip
    """x, gradient, passed: [rows, width]. parts: [factors, programs of `grouping`]. The rest is a `QuantizerTables`'."""
    grid, settings = grouping(x, size)
    fake_gradients[grid](
        x, gradient, lattice, factors, clip, x if passed is None else passed, clip if parts is None else parts,
        TABLES=tables, PLACES=places, STEP=TYPES[step_dtype], INPUTS=passed is not None, SUMS=parts is not None, **settings,
    )  # fmt: skip


def prepared(tables: Tables) -> QuantizerTables:
    """`QuantizerTables.of` in one launch, in the uniform form in none."""
    codes = tables.levels.shape[1]
    clip = tables.clip.detach().contiguous()
    if tables.zero is None:
        return QuantizerTables(clip.new_empty(0, dtype=torch.int8), clip, 0, codes)
    places, kept = (LATTICE_MAX + 1, torch.int8) if codes <= LATTICE_MAX + 1 else (codes, torch.int16)
    lattice, factors = clip.new_empty(len(clip), places, dtype=kept), clip.new_empty(len(clip), 4)
    _prepare(tables.levels, tables.zero, clip, lattice, factors)
    return QuantizerTables(lattice, factors, len(clip), places)
