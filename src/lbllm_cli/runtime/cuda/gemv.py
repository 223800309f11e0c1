"""Decode: products of packed weights with one to eight rows of activations.

A program takes a few rows of weights and all their groups; its lanes lie along the groups, and what its warps have summed is
added at the end, in the same order every time. So all of a row's groups are read at once, and no partial sums go through memory.
"""

# Kernels have the types of the compiler, which mypy does not know.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.runtime.cuda.instructions import dot4, look_up, rounded_to
from lbllm_cli.runtime.cuda.level_bytes import levels_of_selectors, scaled, table_for
from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.weights import CODES_OF_WORD, FOLD, CudaWeights, span

# Above, matrix products are the better use of a decoded weight.
ROWS_MAX, VALUE_ROWS_MAX = 8, 4
# Programs that a GPU should have at least, and words that they read at once: 16 bytes of each lane of two warps, or of four.
_PROGRAMS, _WORDS = 512, 256
# Words whose columns a program deals out.
_DEALT = 64


@triton.jit
def store_outputs(out, total, m, n, rows, outs, bias, residual, BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    """total float32 [a, b] to out [rows, outs], of which m [a, 1] and n [1, b] are the places, with bias [outs] and residual, of
    out's shape, added in float32.
    """
    here = (m < rows) & (n < outs)
    at = m.to(tl.int64) * outs + n
    if BIAS:
        total += tl.load(bias + n, mask=n < outs, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, rounded_to(total, out.dtype.element_ty), mask=here)


@triton.jit
def _of_rows(values, group, outs, groups, OUTS: tl.constexpr):
    """A value of each row of weights and group: values [outs, groups], group [1, 1, groups, 1] -> [1, OUTS, groups, 1]."""
    index, first = tl.arange(0, OUTS)[None, :, None, None], tl.program_id(0) * OUTS
    found = tl.load(values + first * groups + group, mask=group < groups, other=0)
    # Row by row: for so few values at once Triton takes the lanes that need them, and shuffles nothing. No select is left, as
    # a thread has all rows.
    for row in tl.static_range(1, OUTS):
        own = tl.load(values + (first + row) * groups + group, mask=group < tl.where(first + row < outs, groups, 0), other=0)
        found = tl.where(index == row, own, found)
    return tl.broadcast_to(found, [1, OUTS, group.shape[2], 1])


@triton.jit
def _codes(words, levels, group, outs, groups, W: tl.constexpr, OUTS: tl.constexpr, WORDS: tl.constexpr):
    """Selectors of the even and the odd codes of some groups, [1, outs, groups, words]; stored levels, [1, outs, groups, 1]."""
    n, w = tl.arange(0, OUTS)[None, :, None, None], tl.arange(0, WORDS)[None, None, None, :]
    n += tl.program_id(0) * OUTS
    word = tl.load(words + (n * groups + group) * W + w, mask=(n < outs) & (group < groups) & (w < W), other=0)
    return word & 0x33333333, (word >> 2) & 0x33333333, _of_rows(levels, group, outs, groups, OUTS)


@triton.jit
def _finish(
    out, total, scale, rows, outs, bias, residual,
    ROWS: tl.constexpr, OUTS: tl.constexpr, BYTES: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """total float32 [rows, outs, groups, 1] -> out. scale: of a row where levels are BYTES; else it is in the total."""
    sums = tl.reshape(tl.sum(total, 2), [ROWS, OUTS])
    m, n = tl.arange(0, ROWS)[:, None], tl.program_id(0) * OUTS + tl.arange(0, OUTS)[None, :]
    if BYTES > 0:
        sums = scaled(sums, scale, n, outs)
    store_outputs(out, sums, m, n, rows, outs, bias, residual, BIAS, RESIDUAL)


@triton.jit
def _add_share(total, dots, factor, step, m, place, rows, steps, STEPS: tl.constexpr):
    """total plus what has one factor: dots int32 [rows, outs, groups, words]; place: of its step among those of a row."""
    if STEPS > 0:
        factor = factor * tl.load(step + m * steps + place, mask=(m < rows) & (place < steps), other=0.0)
    return total + tl.sum(dots, 3, keep_dims=True).to(tl.float32) * factor


@triton.jit
def gemv_places(
    words, levels, table, scale, places, step, bias, residual, out, rows, outs, groups, steps,
    W: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    BYTES: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A program: OUTS rows of weights. ROWS, OUTS, GROUPS, WORDS: of a tile. places: as int32. V: `span`. BYTES: see
    `levels_of_selectors`; folded groups count as one, four bytes as an int32. steps: of a row of activations. STEPS: how many
    groups share a step, 0 for all of a row. PARTS: steps of folded groups, 1, 2 or 4.
    """
    m, w = tl.arange(0, ROWS)[:, None, None, None], tl.arange(0, WORDS)[None, None, None, :]
    total = tl.zeros([ROWS, OUTS, GROUPS, 1], tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)[None, None, :, None]
        even, odd, stored = _codes(words, levels, group, outs, groups, W, OUTS, WORDS)
        a, b, c, d = levels_of_selectors(stored, table, BYTES)
        x = places + (m * groups + group) * (4 * W) + w // V * (4 * V) + w % V
        there = (m < rows) & (group < groups) & (w < W)
        factor = 1.0 if BYTES else _of_rows(scale, group, outs, groups, OUTS).to(tl.float32)
        place = group * PARTS // STEPS if STEPS > 0 else group
        none = tl.zeros([ROWS, OUTS, GROUPS, WORDS], tl.int32)
        dots = dot4(look_up(even, a), tl.load(x, mask=there, other=0), none)
        if PARTS == 4:
            total = _add_share(total, dots, factor, step, m, place, rows, steps, STEPS)
            dots = none
        dots = dot4(look_up(odd, b), tl.load(x + V, mask=there, other=0), dots)
        if PARTS > 1:
            total = _add_share(total, dots, factor, step, m, place + PARTS // 2 - 1, rows, steps, STEPS)
            dots = none
        dots = dot4(look_up(even >> 16, c), tl.load(x + 2 * V, mask=there, other=0), dots)
        if PARTS == 4:
            total = _add_share(total, dots, factor, step, m, place + 2, rows, steps, STEPS)
            dots = none
        dots = dot4(look_up(odd >> 16, d), tl.load(x + 3 * V, mask=there, other=0), dots)
        total = _add_share(total, dots, factor, step, m, place + PARTS - 1, rows, steps, STEPS)
    if STEPS == 0:
        total *= tl.load(step + m, mask=m < rows, other=0.0)
    _finish(out, total, scale, rows, outs, bias, residual, ROWS, OUTS, BYTES, BIAS, RESIDUAL)


@triton.jit
def deal_columns(x, planes, width, words, V: tl.constexpr, BLOCK: tl.constexpr):
    """A program: BLOCK words' columns of a row of x [rows, width], to float32 [rows, 16, words], in the order of a word's codes.

    So a lane's activations of one code of its words lie beside each other, as its words do.
    """
    row, code = tl.program_id(0), tl.arange(0, 16)[:, None]
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    column = word // V * (16 * V) + code // 4 * (4 * V) + word % V * 4 + code % 4
    found = tl.load(x + row * width + column, mask=(word < words) & (column < width), other=0.0).to(tl.float32)
    tl.store(planes + (row * 16 + code) * words + word, found, mask=word < words)


@triton.jit
def gemv_values(
    words, levels, table, scale, planes, bias, residual, out, rows, outs, groups,
    W: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    BYTES: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """`gemv_places` with activations in float32, as `deal_columns` leaves them."""
    m, w = tl.arange(0, ROWS)[:, None, None, None], tl.arange(0, WORDS)[None, None, None, :]
    total = tl.zeros([ROWS, OUTS, GROUPS, 1], tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)[None, None, :, None]
        even, odd, stored = _codes(words, levels, group, outs, groups, W, OUTS, WORDS)
        a, b, c, d = levels_of_selectors(stored, table, BYTES)
        x, there = planes + (m * (16 * groups) + group) * W + w, (m < rows) & (group < groups) & (w < W)
        sums = tl.zeros([ROWS, OUTS, GROUPS, WORDS], tl.float32)
        for code in tl.static_range(16):
            selector = (even if code // 4 % 2 == 0 else odd) >> (code // 8 * 16)
            level = (a if code // 4 == 0 else b) if code < 8 else (c if code // 4 == 2 else d)
            value = (look_up(selector, level) << (24 - code % 4 * 8)) >> 24
            sums += value.to(tl.float32) * tl.load(x + code * (groups * W), mask=there, other=0.0)
        factor = 1.0 if BYTES else _of_rows(scale, group, outs, groups, OUTS).to(tl.float32)
        total += tl.sum(sums, 3, keep_dims=True) * factor
    _finish(out, total, scale, rows, outs, bias, residual, ROWS, OUTS, BYTES, BIAS, RESIDUAL)


def tile(rows: int, outs: int, groups: int, words: int, values: bool = False) -> dict[str, Any]:
    """Constants of a program for `rows` of activations and weights [outs, groups], words of a group; and how it is compiled.

    values: of `gemv_values`.
    1 x 4096 x 32 groups of 128: tiles of 1 x 4 x 32 x 8 words, 2 warps: four rows of weights, the 4,096 columns of
    each read at once.
    """
    m, each = triton.next_power_of_2(rows), triton.next_power_of_2(words)
    n = 4 if m <= (2 if values else 4) else 2  # what registers hold
    while n > 1 and outs < n * _PROGRAMS:
        n //= 2
    at_once = _WORDS if outs >= n * _PROGRAMS else 2 * _WORDS
    count = max(1, min(triton.next_power_of_2(groups), at_once // each))
    warps = min(max(count * each // 128, 1), 8)
    shape = {"ROWS": m, "OUTS": n, "GROUPS": count, "WORDS": each}
    return {"W": words, "V": span(words * CODES_OF_WORD), **shape, "num_warps": warps, "enable_fp_fusion": True}


_WEIGHTS = "Tensor words, Tensor levels, Tensor scale"


@operator(f"gemv_places({_WEIGHTS}, Tensor places, Tensor step, int sharing, Tensor? bias, Tensor? residual, Tensor(a!) out)")
def _gemv_places(
    words: Tensor, levels: Tensor, scale: Tensor, places: Tensor, step: Tensor, sharing: int, bias: Tensor | None,
    residual: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    rows, (outs, groups, each) = len(out), words.shape
    constants = {**tile(rows, outs, groups, each), **form_of(levels, groups, sharing)}
    gemv_places[(-(-outs // constants["OUTS"]),)](
        words, _loaded(levels, groups), table_for(levels), scale, places.view(torch.int32), step, out if bias is None else bias,
        out if residual is None else residual, out, rows, outs, groups,
        step.shape[1], BIAS=bias is not None, RESIDUAL=residual is not None, **constants,
    )  # fmt: skip


def form_of(levels: Tensor, groups: int, sharing: int = 0) -> dict[str, int]:
    """BYTES, STEPS and PARTS of kernels for `groups` of words, where `sharing` groups of weights share a step: folded groups are
    one, or have several steps.
    """
    of_group = levels.shape[1] // groups if levels.dtype == torch.uint8 else 0
    parts = FOLD // sharing if of_group == FOLD and 0 < sharing < FOLD else 1
    return {"BYTES": of_group, "STEPS": max(1, sharing // of_group) if of_group and sharing else sharing, "PARTS": parts}


def _loaded(levels: Tensor, groups: int) -> Tensor:
    """Levels as kernels for few rows load them: all that one of `groups` of words has at once."""
    return levels.view(torch.int32) if levels.shape[1] == FOLD * groups else levels


@operator("deal_columns(Tensor x, int group_size, Tensor(a!) planes)")
def _deal_columns(x: Tensor, group_size: int, planes: Tensor) -> None:
    (rows, width), words = x.shape, planes.shape[2]
    deal_columns[(rows, -(-words // _DEALT))](x, planes, width, words, V=span(group_size), BLOCK=_DEALT)


@operator(f"gemv_values({_WEIGHTS}, Tensor planes, Tensor? bias, Tensor? residual, Tensor(a!) out)")
def _gemv_values(
    words: Tensor, levels: Tensor, scale: Tensor, planes: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    rows, (outs, groups, each) = len(out), words.shape
    constants, of_group = tile(rows, outs, groups, each, values=True), form_of(levels, groups)["BYTES"]
    gemv_values[(-(-outs // constants["OUTS"]),)](
        words, _loaded(levels, groups), table_for(levels), scale, planes, out if bias is None else bias,
        out if residual is None else residual, out, rows, outs, groups,
        BYTES=of_group, BIAS=bias is not None, RESIDUAL=residual is not None, **constants,
    )  # fmt: skip


def gemv_quantized(
    weights: CudaWeights, places: Tensor, step: Tensor, sharing: int, out: Tensor, residual: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:  # fmt: skip
    """All outputs of quantized rows into `out`, 1 to 8 of them.

    places: int8 [rows, weights.padded_width], T - Z in the order of columns, 0 behind a ragged end. step: float32 [rows, steps].
    sharing: groups of weights that share a step, 0 where all of a row do; of folded ones 1, 2 or a multiple of 4. out: [rows,
    weights.rows], bfloat16, float16 or float32. residual: added, of out's shape, in any of these; may be `out` itself. bias:
    [weights.rows]. All of them contiguous.
    """
    _gemv_places(weights.words, weights.levels, weights.scale, places, step, sharing, bias, residual, out)


def gemv(weights: CudaWeights, x: Tensor, out: Tensor, residual: Tensor | None = None, bias: Tensor | None = None) -> None:
    """All outputs of rows in full precision: x bfloat16, float16 or float32 [rows, in], 1 to 4 of them. Two
    launches; the rest as above.
    """
    planes = x.new_empty(len(x), CODES_OF_WORD, weights.padded_width // CODES_OF_WORD, dtype=torch.float32)
    _deal_columns(x, weights.group_size * weights.fold, planes)
    _gemv_values(weights.words, weights.levels, weights.scale, planes, bias, residual, out)
