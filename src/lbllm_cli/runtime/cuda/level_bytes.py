"""Levels of 2 bits in a kernel: a group's byte, as its file has it, becomes the four int8 levels that every kernel computes with.

So weights of this form are as small in a GPU's memory as on disk: with groups of 16 a word of codes and a byte, 2.5 bits each,
where levels of a byte and a scale for each group would be 5.
"""

# Kernels have the types of the compiler, which mypy does not know.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from lbllm_cli.format.names import TABLE_LEVELS
from lbllm_cli.runtime.cuda.instructions import look_up

INNER, OUTER = (tl.constexpr(sum(value << 8 * place for place, value in enumerate(table))) for table in TABLE_LEVELS)


@triton.jit
def levels_of(places):
    """A group's four levels, int32, that of code 0 in the lowest byte, out of its byte: int32 0..255.

    0b00_11_01_00 -> -4, 13, -127, 41.
    """
    places = (places | (places << 4)) & 0x0F0F
    places = (places | (places << 2)) & 0x3333
    sizes = (look_up(places, INNER) & 0xFFFF) | (look_up(places, OUTER) & -65536)
    # Codes 0 and 2 are negative. No value of a table is 0, so adding 1 to a byte's complement never carries into the next.
    return (sizes ^ 0x00FF00FF) + 0x00010001


@triton.jit
def levels_of_selectors(stored, BYTES: tl.constexpr):
    """Levels for each of the four selectors of a word. BYTES: that levels have, 0 where they are no bytes, 4 of folded groups."""
    if BYTES == 0:
        return stored, stored, stored, stored
    elif BYTES == 1:
        level = levels_of(stored.to(tl.int32))
        return level, level, level, level
    else:
        a, b = levels_of(stored & 255), levels_of((stored >> 8) & 255)
        return a, b, levels_of((stored >> 16) & 255), levels_of((stored >> 24) & 255)


@triton.jit
def scaled(total, scale, n, outs):
    """total float32 [a, b, ...] times the scale of each row of weights: scale float16 [outs], n of total's axes, where its rows
    are.
    """
    return total * tl.load(scale + n, mask=n < outs, other=0.0).to(tl.float32)
