"""What kernels want of single instructions, each with a plain form of the same result for the interpreter.

Triton has no names for the first two, and fuses a product with what is added to it. Its interpreter cuts float32 off where a GPU
rounds it to bfloat16, and multiplies matrices of bfloat16 as if they held whole numbers.
"""

# Kernels have the types of the compiler, which mypy does not know.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from lbllm_cli.runtime.cuda.operators import INTERPRETED

NATIVE = tl.constexpr(not INTERPRETED)


@triton.jit
def look_up(selector, table):
    """Four bytes of a table of four by the low two bits of each nibble of the selector's low half, the others 0; int32."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $2, $1;", "=r,r,r", [selector, table], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        found = (table >> ((selector & 3) * 8)) & 255
        for i in tl.static_range(1, 4):
            found |= ((table >> (((selector >> (4 * i)) & 3) * 8)) & 255) << (8 * i)
        return found


@triton.jit
def dot4(a, b, c):
    """c plus the sum of the products of the four signed bytes of a and b; int32."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            c += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
        return c


@triton.jit
def product(a, b):
    """a * b, float32, rounded before anything is added to it: codes hang on it."""
    if NATIVE:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return a * b


@triton.jit
def nearest_integer(x):
    """float32 -> int32, ties to the even one. What is not a number, or larger than 4,096, gives a number of no meaning."""
    if NATIVE:
        return tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        held = tl.minimum(tl.maximum(x, -4096.0), 4096.0)
        return ((held + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 * 2^23: what is added to it loses its fraction


@triton.jit
def rounded_to(x, TYPE: tl.constexpr):
    """float32 -> TYPE, to the nearest value, ties to the even one."""
    if NATIVE:
        return x.to(TYPE)
    elif tl.bfloat16 == TYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    else:
        return x.to(TYPE)


@triton.jit
def multiply_add(a, b, total):
    """total plus the matrix product of a and b, floats of any one type; products and sums in float32."""
    if NATIVE:
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
