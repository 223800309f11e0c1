"""The model's head for few rows: its weights, in 16 bits, are read once for all of them."""

# Kernels have the types of the compiler, which mypy does not know.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.runtime.cuda.instructions import rounded_to
from lbllm_cli.runtime.cuda.operators import operator

# Above, torch's matrix product is the better one.
ROWS_MAX = 8
# Inputs that are read at once: 16 bytes of each of 128 threads.
_BLOCK = 1024


@triton.jit
def head_rows(weight, x, out, rows, outs, width, ROWS: tl.constexpr, OUTS: tl.constexpr, BLOCK: tl.constexpr):
    """A program: OUTS rows of weight [outs, width] with all of x [rows, width]; summed in float32."""
    m, k = tl.arange(0, ROWS)[:, None, None], tl.arange(0, BLOCK)[None, None, :]
    n = (tl.program_id(0) * OUTS + tl.arange(0, OUTS))[None, :, None]
    own = weight + n.to(tl.int64) * width
    total = tl.zeros([ROWS, OUTS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + k < width
        values = tl.load(x + m * width + start + k, mask=inside & (m < rows), other=0.0).to(tl.float32)
        total += tl.load(own + start + k, mask=inside & (n < outs), other=0.0).to(tl.float32) * values
    m, n = tl.arange(0, ROWS)[:, None], tl.program_id(0) * OUTS + tl.arange(0, OUTS)[None, :]
    found = rounded_to(tl.sum(total, 2), out.dtype.element_ty)
    tl.store(out + m.to(tl.int64) * outs + n, found, mask=(m < rows) & (n < outs))


def tile(rows: int, width: int) -> dict[str, Any]:
    """Constants of a program, and how it is compiled: 1, 4096 -> 8 rows of the head, 1,024 inputs at once, 4 warps."""
    m, block = triton.next_power_of_2(rows), min(triton.next_power_of_2(width), _BLOCK)
    constants = {"ROWS": m, "OUTS": max(1, ROWS_MAX // m), "BLOCK": block}
    return {**constants, "num_warps": max(1, block // 256), "enable_fp_fusion": True}


@operator("head_logits(Tensor weight, Tensor x, Tensor(a!) out)")
def _head_logits(weight: Tensor, x: Tensor, out: Tensor) -> None:
    (outs, width), rows = weight.shape, len(x)
    constants = tile(rows, width)
    head_rows[(-(-outs // constants["OUTS"]),)](weight, x, out, rows, outs, width, **constants)


def head_logits(weight: Tensor, x: Tensor, out: Tensor) -> None:
    """out = x weight^T: weight [vocabulary, hidden], x [rows, hidden], out [rows, vocabulary], any floats, 1 to 8 rows."""
    _head_logits(weight, x, out)
