"""Prefill and batches: matrix products with packed weights that are decoded in the kernel.

A program decodes a slice of a unit, at most 128 columns, for its rows of weights; each is decoded once for every tile of rows of
activations. A unit is what has one factor: a group, or, where a row has one scale, the groups whose inputs share a step. So small
groups do not make small matrix products.
"""

# Kernels have the types of the compiler, which mypy does not know.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.runtime.cuda.gemv import form_of, store_outputs
from lbllm_cli.runtime.cuda.instructions import look_up, multiply_add, rounded_to
from lbllm_cli.runtime.cuda.level_bytes import scaled, table_for
from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.weights import CODES_OF_WORD, CudaWeights, span

# Words of a slice: tensor cores take at least 32 columns, and 128 bytes are a line of shared memory.
_SLICE_MIN, _SLICE_MAX = 2, 8


@triton.jit
def _selectors(words, n, outs, width, first, end, part, V: tl.constexpr, SLICE: tl.constexpr, PARTS: tl.constexpr):
    """Selectors of SLICE words of each row from `first` on, those from `end` on 0, in the order of columns: [outs, SLICE / V, 4,
    V], or a part of the four. n [outs]. width: words of a row.
    """
    n = n[:, None, None, None]
    w = first + tl.arange(0, SLICE // V)[None, :, None, None] * V + tl.arange(0, V)[None, None, None, :]
    word = tl.load(words + n * width + w, mask=(n < outs) & (w < end), other=0)
    selector = part * (4 // PARTS) + tl.arange(0, 4 // PARTS)
    shift = (selector % 2 * 2 + selector // 2 * 16)[None, None, :, None]
    return word >> shift


@triton.jit
def _levels_of_words(
    levels, table, n, outs, groups, first, part, W: tl.constexpr, V: tl.constexpr, SLICE: tl.constexpr, BYTES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Levels of the groups of these words, for their selectors: [outs, 1, 1, 1], in bytes [outs, SLICE / V, 1 or 4, 1]; of folded
    groups a part of the four.
    """
    n = n[:, None, None, None]
    if BYTES == 0:
        return tl.load(levels + n * groups + first // W, mask=n < outs, other=0)
    else:
        group = (first + tl.arange(0, SLICE // V) * V)[None, :, None, None] // W
        byte = group * BYTES + (part * (BYTES // PARTS) + tl.arange(0, BYTES // PARTS))[None, None, :, None]
        found = tl.load(levels + n * (groups * BYTES) + byte, mask=(n < outs) & (group < groups), other=0)
        return tl.load(table + found.to(tl.int32))


@triton.jit
def _slice(at, width, UNIT: tl.constexpr, SLICE: tl.constexpr):
    """Of slice `at` of a row of `width` words: its unit, its first word, and where the unit ends. UNIT: its words, 0 for all."""
    of_unit = width if UNIT == 0 else UNIT
    slices = tl.cdiv(of_unit, SLICE)
    unit = at // slices
    return unit, unit * of_unit + at % slices * SLICE, tl.minimum((unit + 1) * of_unit, width)


@triton.jit
def _slices(width, UNIT: tl.constexpr, SLICE: tl.constexpr):
    """How many a row has."""
    of_unit = width if UNIT == 0 else UNIT
    return tl.cdiv(width, of_unit) * tl.cdiv(of_unit, SLICE)


@triton.jit
def _joined(a, b, c, d, OUTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Four neighbours of each selector beside each other: [outs, columns]."""
    # Joining keeps all four in one thread, which then writes whole words to shared memory; a fifth axis would be spread.
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [OUTS, COLUMNS])


@triton.jit
def gemm_places(
    words, levels, table, scale, places, step, bias, residual, out, rows, outs, groups, steps,
    W: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
    BYTES: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A program: a tile [ROWS, OUTS] of outputs. places: int8 [rows, 16 * W * groups]. BYTES: that levels of a group have, 0
    where they are int32, 4 of folded groups, which count as one. steps: of a row of activations. STEPS: how many groups share a
    step, 0 for all of a row. PARTS: steps of folded groups, 1, 2 or 4. UNIT: words that have one factor, 0 for all of a row; with
    PARTS a slice, of which each has a part.
    """
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    width = groups * W
    own = places + m.to(tl.int64)[:, None] * (width * 16)
    total = tl.zeros([ROWS, OUTS], tl.float32)
    for at in range(0, _slices(width, UNIT, SLICE) * PARTS):
        unit, first, end = _slice(at // PARTS, width, UNIT, SLICE)
        part = at % PARTS
        column = first * 16 + part * (SLICE * 16 // PARTS) + tl.arange(0, SLICE * 16 // PARTS)[None, :]
        x = tl.load(own + column, mask=(m < rows)[:, None] & (column < end * 16), other=0)
        level = _levels_of_words(levels, table, n, outs, groups, first, part, W, V, SLICE, BYTES, PARTS)
        four = look_up(_selectors(words, n, outs, width, first, end, part, V, SLICE, PARTS) & 0x33333333, level)
        # Cut to bytes behind the join: where it comes before, Triton 3.9 finds no layout on sm_100 for words of several groups.
        weight = _joined(four, four >> 8, four >> 16, four >> 24, OUTS, SLICE * 16 // PARTS).to(tl.int8)
        dots = tl.dot(x, tl.trans(weight), out_dtype=tl.int32).to(tl.float32)
        factor = 1.0 if BYTES else tl.load(scale + n * groups + unit, mask=n < outs, other=0.0).to(tl.float32)[None, :]
        if STEPS > 0:
            place = first // (W * STEPS) * PARTS + part
            # Folded groups that fill up a row have no step.
            count = rows if PARTS == 1 else tl.where(place < steps, rows, 0)
            factor = factor * tl.load(step + m * steps + place, mask=m < count, other=0.0)[:, None]
        total += dots * factor
    if BYTES:
        total = scaled(total, scale, n[None, :], outs)
    if STEPS == 0:
        total *= tl.load(step + m, mask=m < rows, other=0.0)[:, None]
    store_outputs(out, total, m[:, None], n[None, :], rows, outs, bias, residual, BIAS, RESIDUAL)


@triton.jit
def _level(levels, scale, CODE: tl.constexpr, TYPE: tl.constexpr):
    """The value of a code, of the shape of levels, rounded to TYPE as the decoded weight is."""
    return rounded_to(((levels << (24 - 8 * CODE)) >> 24).to(tl.float32) * scale, TYPE)


@triton.jit
def _picked(selector, a, b, c, d):
    """The value of a code, the low two bits of the selector."""
    return tl.where((selector & 2) != 0, tl.where((selector & 1) != 0, d, c), tl.where((selector & 1) != 0, b, a))


@triton.jit
def gemm_values(
    words, levels, table, scale, x, bias, residual, out, rows, outs, groups, inputs,
    W: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
    BYTES: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """`gemm_places` with x in floats, [rows, inputs], and weights rounded to its type."""
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    width = groups * W
    own = x + m.to(tl.int64)[:, None] * inputs
    TYPE: tl.constexpr = x.dtype.element_ty
    total = tl.zeros([ROWS, OUTS], tl.float32)
    for at in range(0, _slices(width, UNIT, SLICE)):
        unit, first, end = _slice(at, width, UNIT, SLICE)
        column = first * 16 + tl.arange(0, SLICE * 16)[None, :]
        tile = tl.load(own + column, mask=(m < rows)[:, None] & (column < end * 16) & (column < inputs), other=0.0)
        level = _levels_of_words(levels, table, n, outs, groups, first, 0, W, V, SLICE, BYTES, 1)
        factor = tl.load(scale + (n if BYTES else n * groups + unit), mask=n < outs, other=0.0).to(tl.float32)
        factor = factor[:, None, None, None]
        a, b = _level(level, factor, 0, TYPE), _level(level, factor, 1, TYPE)
        c, d = _level(level, factor, 2, TYPE), _level(level, factor, 3, TYPE)
        selector = _selectors(words, n, outs, width, first, end, 0, V, SLICE, 1)
        weight = _joined(
            _picked(selector, a, b, c, d), _picked(selector >> 4, a, b, c, d), _picked(selector >> 8, a, b, c, d),
            _picked(selector >> 12, a, b, c, d), OUTS, SLICE * 16,
        )  # fmt: skip
        total = multiply_add(tile, tl.trans(weight), total)
    store_outputs(out, total, m[:, None], n[None, :], rows, outs, bias, residual, BIAS, RESIDUAL)


def tile(rows: int, words: int, unit: int | None = None, values: bool = False, itemsize: int = 2) -> dict[str, Any]:
    """Constants of a program for `rows` of activations and groups of `words`, and how it is compiled.

    unit: words that have one factor, 0 for all of a row; by default a group's. values: of `gemm_values`, in numbers of `itemsize`
    bytes. 700, 8 -> a tile of 64 x 128 outputs, 128 columns at once.
    """
    # What fits the registers of 128 threads beside the sums of a group, or a decoded slice in 16 bits.
    m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    together = words if unit is None else unit or _SLICE_MAX
    each = min(max(triton.next_power_of_2(together), _SLICE_MIN), _SLICE_MAX)
    constants = {
        "W": words,
        "V": span(words * CODES_OF_WORD),
        "UNIT": words if unit is None else unit,
        "SLICE": each,
        "ROWS": m,
        "OUTS": 128 if rows > 32 and not values else 64,
    }
    # In float32 three stages of 128 columns take 102,912 bytes, where cards of capability 8.6, 8.9 and 12.0 have 101,376.
    return {**constants, "num_warps": 4, "num_stages": 3 if itemsize == 2 else 2, "enable_fp_fusion": True}


_WEIGHTS = "Tensor words, Tensor levels, Tensor scale"


@operator(f"gemm_places({_WEIGHTS}, Tensor places, Tensor step, int sharing, Tensor? bias, Tensor? residual, Tensor(a!) out)")
def _gemm_places(
    words: Tensor, levels: Tensor, scale: Tensor, places: Tensor, step: Tensor, sharing: int, bias: Tensor | None,
    residual: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    rows, (outs, groups, each) = len(out), words.shape
    form = form_of(levels, groups, sharing)
    # With one scale a row, what has one step has one factor.
    constants = {**tile(rows, each, form["STEPS"] * each if form["BYTES"] else None), **form}
    gemm_places[(-(-outs // constants["OUTS"]), -(-rows // constants["ROWS"]))](
        words, levels, table_for(levels), scale, places, step, out if bias is None else bias,
        out if residual is None else residual, out, rows, outs, groups, step.shape[1], BIAS=bias is not None,
        RESIDUAL=residual is not None, **constants,
    )  # fmt: skip


@operator(f"gemm_values({_WEIGHTS}, Tensor x, Tensor? bias, Tensor? residual, Tensor(a!) out)")
def _gemm_values(
    words: Tensor, levels: Tensor, scale: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    rows, (outs, groups, each) = len(out), words.shape
    of_group = form_of(levels, groups)["BYTES"]
    constants = tile(rows, each, 0 if of_group else None, values=True, itemsize=x.element_size())
    gemm_values[(-(-outs // constants["OUTS"]), -(-rows // constants["ROWS"]))](
        words, levels, table_for(levels), scale, x, out if bias is None else bias, out if residual is None else residual, out,
        rows, outs, groups, x.shape[1], BYTES=of_group, BIAS=bias is not None, RESIDUAL=residual is not None, **constants,
    )  # fmt: skip


def gemm_quantized(
    weights: CudaWeights, places: Tensor, step: Tensor, sharing: int, out: Tensor, residual: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:  # fmt: skip
    """`gemv.gemv_quantized` for any number of rows."""
    _gemm_places(weights.words, weights.levels, weights.scale, places, step, sharing, bias, residual, out)


def gemm(weights: CudaWeights, x: Tensor, out: Tensor, residual: Tensor | None = None, bias: Tensor | None = None) -> None:
    """`gemv.gemv` for any number of rows, with weights that are rounded to the type of x, and x of any width."""
    _gemm_values(weights.words, weights.levels, weights.scale, x, bias, residual, out)
