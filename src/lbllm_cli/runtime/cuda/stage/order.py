"""Levels that crossed in a step, put in order again."""

import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.stage.levels import load_levels, store_levels

_GROUPS = 256


@triton.jit
def sort_four(levels, total, BLOCK: tl.constexpr):
    """A program: BLOCK of `total` groups, in place."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = group < total
    at = group.to(tl.int64) * 4
    a, b, c, d = load_levels(levels, at, here)
    a, b, c, d = tl.minimum(a, b), tl.maximum(a, b), tl.minimum(c, d), tl.maximum(c, d)
    a, c, b, d = tl.minimum(a, c), tl.maximum(a, c), tl.minimum(b, d), tl.maximum(b, d)
    b, c = tl.minimum(b, c), tl.maximum(b, c)
    store_levels(levels, at, here, a, b, c, d)


@operator("sort_levels(Tensor(a!) levels)")
def sort_levels(levels: Tensor) -> None:
    """Sorts each group's levels: float32 [..., 4], in place."""
    total = levels.numel() // 4
    sort_four[(triton.cdiv(total, _GROUPS),)](levels, total, BLOCK=_GROUPS)
