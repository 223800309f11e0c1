"""Levels of 2 bits in a kernel: a group's byte, as its file has it, becomes the four int8 levels that every kernel computes with.

So weights of this form are as small in a GPU's memory as on disk: with groups of 16 a word of codes and a byte, 2.5 bits each,
where levels of a byte and a scale for each group would be 5.
"""

# Kernels have the types of the compiler, which mypy does not know.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.format.level_table import table_of


def table_for(levels: Tensor) -> Tensor:
    """The four levels of each byte as kernels look them up, that of code 0 in the lowest byte: int32 [256]; of other forms, whose
    levels are no bytes, nothing that is read.
    """
    if levels.dtype != torch.uint8:
        return levels
    return table_of(levels.device, ascending=False).view(torch.int32)[:, 0]


@triton.jit
def levels_of_selectors(stored, table, BYTES: tl.constexpr):
    """Levels for each of the four selectors of a word. table: see `table_for`. BYTES: that levels have, 0 where they are no
    bytes, 4 of folded groups.
    """
    if BYTES == 0:
        return stored, stored, stored, stored
    elif BYTES == 1:
        level = tl.load(table + stored.to(tl.int32))
        return level, level, level, level
    else:
        a, b = tl.load(table + (stored & 255)), tl.load(table + ((stored >> 8) & 255))
        return a, b, tl.load(table + ((stored >> 16) & 255)), tl.load(table + ((stored >> 24) & 255))


@triton.jit
def scaled(total, scale, n, outs):
    """total float32 [a, b, ...] times the scale of each row of weights: scale float16 [outs], n of total's axes, where its rows
    are.
    """
    return total * tl.load(scale + n, mask=n < outs, other=0.0).to(tl.float32)
