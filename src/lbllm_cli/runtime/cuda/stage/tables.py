"""Knee tables: the integer ones that real ratios stand for, and the errors of many, for the search of those to begin with."""

import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.format.names import LATTICE_MAX
from lbllm_cli.runtime.cuda.instructions import nearest_integer
from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.stage.quantizers import candidate, grouping

_MOST = tl.constexpr(LATTICE_MAX)


@triton.jit
def deployed_tables(counts, ratio, levels, zero, CODES: tl.constexpr, BLOCK: tl.constexpr):
    """A program: one table. BLOCK: CODES, up to a power of two."""
    table = tl.program_id(0)
    fine_low, fine_high = tl.load(counts + 4 * table).to(tl.int32), tl.load(counts + 4 * table + 1).to(tl.int32)
    coarse_low, coarse_high = tl.load(counts + 4 * table + 2).to(tl.int32), tl.load(counts + 4 * table + 3).to(tl.int32)
    # Larger ones than fit go down anyhow.
    low = tl.minimum(tl.maximum(nearest_integer(tl.load(ratio + 2 * table)), 1), 1024)
    high = tl.minimum(tl.maximum(nearest_integer(tl.load(ratio + 2 * table + 1)), 1), 1024)
    limit = tl.maximum(CODES - 1, _MOST) - fine_low - fine_high
    # With ratios of 1 every table fits.
    while low * coarse_low + high * coarse_high > limit:
        lower = (high == 1) | ((low > 1) & (low * coarse_low > high * coarse_high))
        low, high = tl.where(lower, low - 1, low), tl.where(lower, high, high - 1)
    code = tl.arange(0, BLOCK)
    place = fine_low + low * coarse_low
    fine = code - coarse_low - fine_low  # of a fine level, its distance from zero
    distance = tl.where(fine < -fine_low, low * (fine + fine_low) - fine_low, fine)
    distance = tl.where(fine > fine_high, high * (fine - fine_high) + fine_high, distance)
    tl.store(levels + table * CODES + code, (place + distance).to(tl.uint8), mask=code < CODES)
    tl.store(zero + table, place.to(tl.uint8))


@triton.jit
def table_errors(
    x, lattice, factors, errors, groups, tables, size, PLACES: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr
):
    """A program: one table, and GROUPS groups. size: of a group; BLOCK: the same, up to a power of two."""
    table, group = tl.program_id(0) % tables, tl.program_id(0) // tables * GROUPS + tl.arange(0, GROUPS)
    within = tl.arange(0, BLOCK)[None, :]
    here = (group < groups)[:, None] & (within < size)
    tile = tl.load(x + group.to(tl.int64)[:, None] * size + within, mask=here, other=0.0)
    high, low = tl.maximum(tl.max(tile, 1), 0.0), tl.maximum(-tl.min(tile, 1), 0.0)
    _, _, first = candidate(tile, high, low, lattice + table * PLACES, factors + table * 4, 1.0)
    _, _, second = candidate(tile, high, low, lattice + table * PLACES, factors + table * 4, 0.88)
    tl.store(errors + table * groups + group, tl.where(second < first, second, first), mask=group < groups)


@operator("deployed_tables(Tensor counts, Tensor ratio, Tensor(a!) levels, Tensor(b!) zero)")
def deploy(counts: Tensor, ratio: Tensor, levels: Tensor, zero: Tensor) -> None:
    """See `StageKernels.deployed_tables`."""
    codes = levels.shape[1]
    deployed_tables[(len(levels),)](counts, ratio, levels, zero, CODES=codes, BLOCK=triton.next_power_of_2(codes))


@operator("table_errors(Tensor x, Tensor lattice, Tensor factors, Tensor(a!) errors)")
def find_errors(x: Tensor, lattice: Tensor, factors: Tensor, errors: Tensor) -> None:
    """x: float32 [groups, size]. lattice, factors: of a `QuantizerTables` of n tables. errors: [n, groups]."""
    (blocks,), settings = grouping(x, x.shape[1])
    chosen = {name: settings[name] for name in ("BLOCK", "GROUPS", "num_warps")}
    tables = len(lattice)
    table_errors[(blocks * tables,)](x, lattice, factors, errors, len(x), tables, x.shape[1], PLACES=lattice.shape[1], **chosen)
