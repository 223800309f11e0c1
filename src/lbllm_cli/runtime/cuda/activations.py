"""The activation quantizer as kernels: the codes of `format.activations.quantize`, but where two candidates leave the same error
to the rounding of a sum.
"""

# Kernels have the types of the compiler, which mypy does not know.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.format.activations import Tables
from lbllm_cli.format.names import LATTICE_MAX
from lbllm_cli.runtime.cuda.instructions import nearest_integer, product, rounded_to
from lbllm_cli.runtime.cuda.operators import operator

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Values that a program quantizes where steps are of groups.
_TILE = 512


@dataclass(frozen=True)
class QuantizerTables:
    """A quantizer's tables as the kernels read them; made without waiting for the device.

    lattice: int8 [tables, 128], with 8 bits int16 [tables, 256]: T - Z of the level nearest to each lattice place; empty in the
    uniform form. factors: float32 [tables, 4]: what a group's largest positive value is multiplied by for the step that reaches
    it, the same of its largest negative one, Z, and the last T; uniform: the two clipping factors, twice nothing. count: tables,
    0 in the uniform form. places: of a table in `lattice`; uniform: codes.
    """

    lattice: Tensor
    factors: Tensor
    count: int
    places: int

    @classmethod
    def of(cls, tables: Tables) -> "QuantizerTables":
        """On the device of the tables."""
        codes = tables.levels.shape[1]
        if tables.zero is None:
            nothing = torch.zeros_like(tables.clip)
            lattice = torch.empty(0, dtype=torch.int8, device=tables.levels.device)
            return cls(lattice, torch.cat([tables.clip, nothing], 1), 0, codes)
        places, kept = (LATTICE_MAX + 1, torch.int8) if codes <= LATTICE_MAX + 1 else (codes, torch.int16)
        levels, zero = tables.levels.int(), tables.zero.int().unsqueeze(1)
        middle, place = levels[:, 1:] + levels[:, :-1], torch.arange(places, device=levels.device, dtype=torch.int32)
        # `snap_table`: a place goes to the first level that is not below it by more than the next one above.
        nearest = (middle.unsqueeze(1) < 2 * place.unsqueeze(1)).sum(2)
        below = zero.squeeze(1).float()
        above = levels[:, -1].float() - below
        reach = torch.stack([above, below], 1)
        shares = torch.where(reach > 0, tables.clip / reach, torch.zeros_like(reach))
        factors = torch.cat([shares, torch.stack([below, levels[:, -1].float()], 1)], 1)
        return cls((levels.gather(1, nearest) - zero).to(kept), factors, len(levels), places)

    @property
    def in_bytes(self) -> bool:
        """Whether every T - Z is an int8: up to 7 bits."""
        return self.places <= LATTICE_MAX + 1


@triton.jit
def _reciprocal(step):
    """`format.activations.reciprocal`."""
    return tl.where(step > 1e-30, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step), 0.0)


@triton.jit
def _nearest(x, inverse, table, zero, top):
    """T - Z of the level nearest to each value: x [groups, size], inverse [groups], the rest scalars or [groups, 1]."""
    place = nearest_integer(product(x, inverse[:, None])) + zero
    return tl.load(table + tl.minimum(tl.maximum(place, 0), top)).to(tl.float32)


@triton.jit
def _refit(x, values):
    """The best step for T - Z that were chosen: [groups, size] -> [groups]."""
    return tl.div_rn(tl.sum(x * values, 1), tl.maximum(tl.sum(values * values, 1), 1.0))


@triton.jit
def _uniform(x, high, low, factors, top):
    up, down = product(high, tl.load(factors)), product(low, tl.load(factors + 1))
    inverse = _reciprocal(tl.div_rn(up + down, tl.full(up.shape, top, tl.float32)))
    zero = tl.minimum(tl.maximum(nearest_integer(product(down, inverse)), 0), top)[:, None]
    code = nearest_integer(product(x, inverse[:, None])) + zero
    return (tl.minimum(tl.maximum(code, 0), top) - zero).to(tl.float32)


@triton.jit
def quantize_groups(x, lattice, factors, TABLES: tl.constexpr, PLACES: tl.constexpr, STEP: tl.constexpr):
    """Quantizes a tile of groups that is held in registers, each along its second axis.

    x: float32 [groups, size], size a power of two, 0 where there is no value: that stays 0, and changes nothing else. lattice,
    factors: pointers to those of a `QuantizerTables`; TABLES, PLACES: its `count` and `places`. STEP: type that steps are rounded
    to, such as tl.float32. Returns T - Z, whole numbers as float32 [groups, size], and steps, float32 [groups]; the values are
    their products. [4, 128] -> [4, 128], [4].
    """
    high, low = tl.maximum(tl.max(x, 1), 0.0), tl.maximum(-tl.min(x, 1), 0.0)
    if TABLES == 0:
        values = _uniform(x, high, low, factors, PLACES - 1)
        return values, rounded_to(_refit(x, values), STEP).to(tl.float32)
    else:
        least, best = high, high
        inverse, chosen = high, tl.zeros(high.shape, tl.int32)
        for candidate in tl.static_range(2 * TABLES):
            own = factors + 4 * (candidate // 2)
            up, down, zero, top = tl.load(own), tl.load(own + 1), tl.load(own + 2).to(tl.int32), tl.load(own + 3).to(tl.int32)
            tried = tl.maximum(product(high, up), product(low, down))
            if candidate % 2 == 1:
                tried = product(tried, tl.full(tried.shape, 0.88, tl.float32))
            tried = _reciprocal(tried)
            values = _nearest(x, tried, lattice + PLACES * (candidate // 2), zero, top)
            step = _refit(x, values)
            off = values * step[:, None] - x
            error = tl.sum(off * off, 1)
            if candidate == 0:
                least, best, inverse = error, step, tried
            else:
                better = error < least
                least, best = tl.where(better, error, least), tl.where(better, step, best)
                inverse, chosen = tl.where(better, tried, inverse), tl.where(better, candidate // 2, chosen)
        # Once more rather than kept: the values of a wide row fill the registers.
        taken = factors + 4 * chosen
        zero, top = tl.load(taken + 2).to(tl.int32)[:, None], tl.load(taken + 3).to(tl.int32)[:, None]
        values = _nearest(x, inverse, lattice + (PLACES * chosen)[:, None], zero, top)
        return values, rounded_to(best, STEP).to(tl.float32)


@triton.jit
def quantize_rows(
    x, lattice, factors, found, step, width, groups, padded,
    TABLES: tl.constexpr, PLACES: tl.constexpr, STEP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """A program: COUNT groups of SIZE values of one row of x [rows, width]; BLOCK: SIZE, up to a power of two.

    VALUES: found is [rows, width]. Else it is T - Z, int8 [rows, padded], and step [rows, groups].
    """
    blocks = tl.cdiv(groups, COUNT)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * COUNT + tl.arange(0, COUNT)
    within = tl.arange(0, BLOCK)[None, :]
    column = group[:, None] * SIZE + within
    inside = (within < SIZE) & (column < width)
    tile = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    values, steps = quantize_groups(tile, lattice, factors, TABLES, PLACES, STEP)
    if VALUES:
        tl.store(found + row * width + column, rounded_to(values * steps[:, None], found.dtype.element_ty), mask=inside)
    else:
        tl.store(found + row * padded + column, values.to(tl.int8), mask=(within < SIZE) & (column < padded))
        tl.store(step + row * groups + group, steps, mask=group < groups)


def tile(size: int) -> dict[str, Any]:
    """Constants of a program for groups of `size`, and how it is compiled: 128 -> 4 groups, 4 warps."""
    block = triton.next_power_of_2(size)
    count = max(1, _TILE // block)
    # 8 values a thread, so long as there are threads: a row that shares a step is one program's.
    warps = min(max(count * block // 256, 4), 32)
    # Steps as torch computes them.
    return {"SIZE": size, "BLOCK": block, "COUNT": count, "num_warps": warps, "enable_fp_fusion": False}


def _launch(
    x: Tensor, lattice: Tensor, factors: Tensor, tables: int, places: int, size: int, step_dtype: torch.dtype, found: Tensor,
    step: Tensor | None,
) -> None:  # fmt: skip
    rows, width = x.shape
    padded = found.shape[1]
    size = padded if size >= width else size
    groups, constants = -(-width // size), tile(size)
    quantize_rows[(rows * -(-groups // constants["COUNT"]),)](
        x, lattice, factors, found, found if step is None else step, width, groups, padded,
        TABLES=tables, PLACES=places, STEP=TYPES[step_dtype], VALUES=step is None, **constants,
    )  # fmt: skip


_ARGUMENTS = "Tensor x, Tensor lattice, Tensor factors, int tables, int places, int size, ScalarType step_dtype"


@operator(f"quantize_activations({_ARGUMENTS}, Tensor(a!) found, Tensor(b!) step)")
def _quantize_activations(
    x: Tensor, lattice: Tensor, factors: Tensor, tables: int, places: int, size: int, step_dtype: torch.dtype,
    found: Tensor, step: Tensor,
) -> None:  # fmt: skip
    _launch(x, lattice, factors, tables, places, size, step_dtype, found, step)


@operator(f"quantize_values({_ARGUMENTS}, Tensor(a!) found)")
def _quantize_values(
    x: Tensor, lattice: Tensor, factors: Tensor, tables: int, places: int, size: int, step_dtype: torch.dtype, found: Tensor
) -> None:
    _launch(x, lattice, factors, tables, places, size, step_dtype, found, None)


def quantize_activations(
    x: Tensor, tables: QuantizerTables, size: int, places: Tensor, step: Tensor, step_dtype: torch.dtype = torch.float32
) -> None:
    """Quantizes rows: x float [rows, width] -> places int8 [rows, padded width], T - Z, and step float32 [rows, groups].

    size: values that share a step, all of a row where it is as large; places behind the width become 0. tables: of at most 7
    bits, whose T - Z are bytes, so that a product with them has no term of Z. [3, 200] in groups of 64 -> [3, 256], [3, 4].
    """
    if not tables.in_bytes:
        raise ValueError(f"T - Z of {tables.places} codes do not fit int8; quantize_values has them")
    _quantize_activations(x, tables.lattice, tables.factors, tables.count, tables.places, size, step_dtype, places, step)


def quantize_values(
    x: Tensor, tables: QuantizerTables, size: int, values: Tensor, step_dtype: torch.dtype = torch.float32
) -> None:
    """The values of the codes of x float [rows, width], of any bits, in the dtype of `values`, of the same shape."""
    _quantize_values(x, tables.lattice, tables.factors, tables.count, tables.places, size, step_dtype, values)
