"""What lies between two products of a decode step, in one launch each: norms and gates, and the quantizer of what follows.

Everything is rounded where transformers' modules round it in the dtype of computation, so codes differ from theirs only where the
rounding of a sum goes over an edge.
"""

# Kernels have the types of the compiler, which mypy does not know.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.runtime.cuda.activations import QuantizerTables, quantize_groups, tile
from lbllm_cli.runtime.cuda.instructions import product, rounded_to
from lbllm_cli.runtime.cuda.operators import operator

# Values that are squared at once.
_CHUNK = 2048


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """float32 as a tensor of TYPE would keep it."""
    return rounded_to(x, TYPE).to(tl.float32)


@triton.jit
def store_places(
    x, lattice, factors, found, step, row, group, groups, padded,
    TABLES: tl.constexpr, PLACES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantizes groups of a row that are held in registers, float32 [count, BLOCK], 0 beyond the row's end.

    found: T - Z, int8 [rows, padded]. step: float32 [rows, groups]. group: which they are, [count].
    """
    values, steps = quantize_groups(x, lattice, factors, TABLES, PLACES, tl.float32)
    within = tl.arange(0, BLOCK)[None, :]
    column = group[:, None] * SIZE + within
    tl.store(found + row * padded + column, values.to(tl.int8), mask=(within < SIZE) & (column < padded))
    tl.store(step + row * groups + group, steps, mask=group < groups)


@triton.jit
def _normalizer(x, width, epsilon, CHUNK: tl.constexpr):
    """What a row is multiplied by, a number."""
    squares = tl.zeros([CHUNK], tl.float32)
    for start in range(0, width, CHUNK):
        column = start + tl.arange(0, CHUNK)
        values = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
        squares += values * values
    return tl.rsqrt(tl.sum(squares, 0) / width + epsilon)


@triton.jit
def norm_rows(
    x, weight, lattice, factors, found, step, width, groups, padded, epsilon,
    TABLES: tl.constexpr, PLACES: tl.constexpr, QUANTIZES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program: COUNT groups of one row of x [rows, width], of which it squares all. QUANTIZES: else found is in x's dtype."""
    row = tl.program_id(1).to(tl.int64)
    group, within = tl.program_id(0) * COUNT + tl.arange(0, COUNT), tl.arange(0, BLOCK)[None, :]
    column = group[:, None] * SIZE + within
    inside = (within < SIZE) & (column < width)
    TYPE: tl.constexpr = x.dtype.element_ty
    own = x + row * width
    values = tl.load(own + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.full(column.shape, 1.0, tl.float32) * _normalizer(own, width, epsilon, CHUNK)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    values = rounded(product(rounded(product(values, factor), TYPE), weights), TYPE)
    if QUANTIZES:
        store_places(values, lattice, factors, found, step, row, group, groups, padded, TABLES, PLACES, SIZE, BLOCK)
    else:
        tl.store(found + row * width + column, rounded_to(values, TYPE), mask=inside)


@triton.jit
def gate_rows(
    gate_up, lattice, factors, found, step, width, groups, padded,
    TABLES: tl.constexpr, PLACES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A program: COUNT groups of silu(gate) * up of one row of gate_up [rows, 2 * width]."""
    row = tl.program_id(1).to(tl.int64)
    group, within = tl.program_id(0) * COUNT + tl.arange(0, COUNT), tl.arange(0, BLOCK)[None, :]
    column = group[:, None] * SIZE + within
    inside = (within < SIZE) & (column < width)
    TYPE: tl.constexpr = gate_up.dtype.element_ty
    own = gate_up + row * 2 * width + column
    gate, up = tl.load(own, mask=inside, other=0.0).to(tl.float32), tl.load(own + width, mask=inside, other=0.0).to(tl.float32)
    gate = rounded(tl.div_rn(gate, 1.0 + tl.exp(-gate)), TYPE)
    values = rounded(product(gate, up), TYPE)
    store_places(values, lattice, factors, found, step, row, group, groups, padded, TABLES, PLACES, SIZE, BLOCK)


def shape(rows: int, width: int, padded: int, size: int) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Grid, groups of a row and constants of a kernel that quantizes [rows, width] in groups of `size`.

    1, 4096, 4096, 128 -> 8 programs of 4 groups; where a row shares its step, it is one program's.
    """
    size = padded if size >= width else size
    groups, constants = -(-width // size), tile(size)
    return (-(-groups // constants["COUNT"]), rows), groups, constants


_QUANTIZER = "Tensor lattice, Tensor factors, int tables, int places, int size, Tensor(a!) found, Tensor(b!) step"


@operator(f"norm_and_quantize(Tensor x, Tensor weight, float epsilon, {_QUANTIZER})")
def _norm_and_quantize(
    x: Tensor, weight: Tensor, epsilon: float, lattice: Tensor, factors: Tensor, tables: int, places: int, size: int,
    found: Tensor, step: Tensor,
) -> None:  # fmt: skip
    width, padded = x.shape[1], found.shape[1]
    grid, groups, constants = shape(len(x), width, padded, size)
    norm_rows[grid](
        x, weight, lattice, factors, found, step, width, groups, padded, epsilon, TABLES=tables, PLACES=places, QUANTIZES=True,
        CHUNK=min(triton.next_power_of_2(width), _CHUNK), **constants,
    )  # fmt: skip


@operator("norm(Tensor x, Tensor weight, float epsilon, Tensor(a!) out)")
def _norm(x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
    width = x.shape[1]
    grid, groups, constants = shape(len(x), width, width, min(width, _CHUNK // 2))
    norm_rows[grid](
        x, weight, x, x, out, x, width, groups, width, epsilon, TABLES=0, PLACES=0, QUANTIZES=False,
        CHUNK=min(triton.next_power_of_2(width), _CHUNK), **constants,
    )  # fmt: skip


@operator(f"gate_and_quantize(Tensor gate_up, {_QUANTIZER})")
def _gate_and_quantize(
    gate_up: Tensor, lattice: Tensor, factors: Tensor, tables: int, places: int, size: int, found: Tensor, step: Tensor
) -> None:
    rows, width, padded = len(gate_up), gate_up.shape[1] // 2, found.shape[1]
    grid, groups, constants = shape(rows, width, padded, size)
    gate_rows[grid](gate_up, lattice, factors, found, step, width, groups, padded, TABLES=tables, PLACES=places, **constants)


def norm_and_quantize(
    x: Tensor, weight: Tensor, epsilon: float, tables: QuantizerTables, size: int, places: Tensor, step: Tensor
) -> None:
    """The RMS norm of rows, quantized: x [rows, width], weight [width], in one dtype; the rest as in `quantize_activations`."""
    _norm_and_quantize(x, weight, epsilon, tables.lattice, tables.factors, tables.count, tables.places, size, places, step)


def norm(x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
    """The RMS norm of rows: x [rows, width], weight [width], out like x, in one dtype."""
    _norm(x, weight, epsilon, out)


def gate_and_quantize(gate_up: Tensor, tables: QuantizerTables, size: int, places: Tensor, step: Tensor) -> None:
    """silu(gate) * up, quantized: gate_up [rows, 2 * width], gates first; the rest as in `quantize_activations`."""
    _gate_and_quantize(gate_up, tables.lattice, tables.factors, tables.count, tables.places, size, places, step)
