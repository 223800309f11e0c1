"""Sums over tokens of products of inputs, `ptq.moments`: 16-bit floats on tensor cores, sums in float32."""

import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.runtime.cuda.instructions import multiply_add, rounded_to
from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.stage.groups import pair_below

# A program's piece of the result, and tokens that it reads at once.
SIDE, TOKENS = 128, 64


@triton.jit
def _inputs(x, token, column, tokens, width):
    """A tile of inputs [tokens, width]: token [n], column [m] -> [n, m]."""
    here = (token < tokens)[:, None] & (column < width)[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * width + column[None, :], mask=here, other=0.0)


@triton.jit
def add_squares(x, sums, tokens, width, SIDE: tl.constexpr, TOKENS: tl.constexpr):
    """A program: sums += x^T x in one piece on or below the diagonal, and in the one across it, which has the same values."""
    i, j = pair_below(tl.program_id(0))
    row, column = i * SIDE + tl.arange(0, SIDE), j * SIDE + tl.arange(0, SIDE)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        left = _inputs(x, token, row, tokens, width)
        total = multiply_add(tl.trans(left), _inputs(x, token, column, tokens, width), total)
    here = (row < width)[:, None] & (column < width)[None, :]
    place = sums + row.to(tl.int64)[:, None] * width + column[None, :]
    total += tl.load(place, mask=here, other=0.0)
    tl.store(place, total, mask=here)
    if i != j:
        tl.store(sums + column.to(tl.int64)[None, :] * width + row[:, None], total, mask=here)


@triton.jit
def add_drift(x, y, sums, tokens, width, across, SIDE: tl.constexpr, TOKENS: tl.constexpr):
    """A program: sums += (y - x)^T x in one piece. across: pieces of a row."""
    row = tl.program_id(0) // across * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(0) % across * SIDE + tl.arange(0, SIDE)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        own = _inputs(x, token, row, tokens, width)
        apart = _inputs(y, token, row, tokens, width).to(tl.float32) - own.to(tl.float32)
        apart = rounded_to(apart, x.dtype.element_ty)
        total = multiply_add(tl.trans(apart), _inputs(x, token, column, tokens, width), total)
    here = (row < width)[:, None] & (column < width)[None, :]
    place = sums + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(place, total + tl.load(place, mask=here, other=0.0), mask=here)


_SETTINGS = {"SIDE": SIDE, "TOKENS": TOKENS, "num_warps": 8, "num_stages": 3}


@operator("add_squares(Tensor x, Tensor(a!) sums)")
def square(x: Tensor, sums: Tensor) -> None:
    """sums += x^T x: x 16-bit floats [tokens, in], sums [in, in], symmetric."""
    pieces = triton.cdiv(x.shape[1], SIDE)
    add_squares[(pieces * (pieces + 1) // 2,)](x, sums, *x.shape, **_SETTINGS)


@operator("add_drift(Tensor x, Tensor y, Tensor(a!) sums)")
def drift(x: Tensor, y: Tensor, sums: Tensor) -> None:
    """sums += (y - x)^T x, y - x rounded to x's dtype: x, y 16-bit floats [tokens, in], sums [in, in]."""
    pieces = triton.cdiv(x.shape[1], SIDE)
    add_drift[(pieces * pieces,)](x, y, sums, *x.shape, pieces, **_SETTINGS)
