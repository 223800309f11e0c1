"""The newest token's keys and values, written as records of a 4-bit cache, and its queries: one launch for all heads."""

# Kernels have the types of the compiler, which mypy does not know.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.format.activations import Tables
from lbllm_cli.runtime.cuda.activations import QuantizerTables, quantize_groups
from lbllm_cli.runtime.cuda.fused import rounded
from lbllm_cli.runtime.cuda.instructions import nearest_integer, product, rounded_to
from lbllm_cli.runtime.cuda.operators import operator

# Of a code in 4 bits, two of which are a byte.
CODES = tl.constexpr(16)
# Bytes of a record behind its codes: the step, and the table or Z.
MARK = tl.constexpr(3)
# Values that a program turns or quantizes.
_TILE = 512


@dataclass(frozen=True)
class RecordTables:
    """A quantizer of keys or values in 4 bits as the kernels read it; made without waiting for the device.

    quantizer: what codes are found with. values: int8 [tables, 16], T - Z of each code; in the uniform form, whose Z lies in the
    record, T. size: values that share a step, an even number. centre: of centred keys, float32 [kv_heads, head_dim].
    """

    quantizer: QuantizerTables
    values: Tensor
    size: int
    centre: Tensor | None = None

    @classmethod
    def of(cls, tables: Tables, size: int, centre: Tensor | None = None) -> "RecordTables":
        """On the device of the tables."""
        zero = 0 if tables.zero is None else tables.zero.int().unsqueeze(1)
        return cls(QuantizerTables.of(tables), (tables.levels.int() - zero).to(torch.int8), size, centre)


def recordable(tables: Tables, size: int) -> bool:
    """Whether the kernels have this quantizer of keys or values: of 4 bits, two codes a byte."""
    return tables.levels.shape[1] == CODES.value and size % 2 == 0


@triton.jit
def _normed(x, norm, channel, inside, factor, TYPE: tl.constexpr):
    """transformers' RMS norm of heads: rounded before its weight as well as after."""
    weight = tl.load(norm + channel, mask=inside, other=0.0).to(tl.float32)
    return rounded(product(rounded(product(x, factor), TYPE), weight), TYPE)


@triton.jit
def _turned(
    x, norm, cosine, sine, channel, inside, width, epsilon,
    NORM: tl.constexpr, TYPE: tl.constexpr, HEADS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Heads after their norm, if they have one, and the rotary embedding. x: where each begins, [HEADS * COUNT, 1]."""
    half = width // 2
    first = channel < half
    partner = tl.where(first, channel + half, channel - half)
    own = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(tl.reshape(own * own, [HEADS, COUNT * BLOCK]), 1) / width
        factor = tl.reshape(tl.broadcast_to(tl.rsqrt(mean + epsilon)[:, None], [HEADS, COUNT * BLOCK]), [HEADS * COUNT, BLOCK])
        own = _normed(own, norm, channel, inside, factor, TYPE)
        other = _normed(other, norm, partner, inside, factor, TYPE)
    cos = tl.load(cosine + channel, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sine + channel, mask=inside, other=0.0).to(tl.float32)
    other = rounded(product(tl.where(first, -other, other), sin), TYPE)
    return rounded(rounded(product(own, cos), TYPE) + other, TYPE)


@triton.jit
def _choose(x, lattice, factors, TABLES: tl.constexpr, PLACES: tl.constexpr):
    """T - Z [groups, size], steps [groups], and the byte that ends a record [groups]: the table that was taken, or Z."""
    if TABLES == 0:
        values, step = quantize_groups(x, lattice, factors, TABLES, PLACES, tl.bfloat16)
        up = product(tl.maximum(tl.max(x, 1), 0.0), tl.load(factors))
        down = product(tl.maximum(-tl.min(x, 1), 0.0), tl.load(factors + 1))
        reach = tl.div_rn(up + down, tl.full(up.shape, PLACES - 1, tl.float32))
        inverse = tl.where(reach > 1e-30, tl.div_rn(tl.full(up.shape, 1.0, tl.float32), reach), 0.0)
        return values, step, tl.minimum(tl.maximum(nearest_integer(product(down, inverse)), 0), PLACES - 1)
    else:
        values, step = quantize_groups(x, lattice, factors, 1, PLACES, tl.float32)
        mark = tl.zeros(step.shape, tl.int32)
        off = values * step[:, None] - x
        least = tl.sum(off * off, 1)
        for table in tl.static_range(1, TABLES):
            others, its = quantize_groups(x, lattice + PLACES * table, factors + 4 * table, 1, PLACES, tl.float32)
            off = others * its[:, None] - x
            error = tl.sum(off * off, 1)
            better = error < least
            least, step, mark = tl.where(better, error, least), tl.where(better, its, step), tl.where(better, table, mark)
            values = tl.where(better[:, None], others, values)
        return values, rounded(step, tl.bfloat16), mark


@triton.jit
def _write(
    x, record, there, lattice, factors, levels,
    TABLES: tl.constexpr, PLACES: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Records of groups x, float32 [ROWS, BLOCK]. record: where each goes, [ROWS]. there: whether it is one, [ROWS]."""
    values, step, mark = _choose(x, lattice, factors, TABLES, PLACES)
    if TABLES == 0:
        code = values.to(tl.int32) + mark[:, None]
    else:
        # T ascends: a code is the number of levels below its own.
        code = tl.zeros(x.shape, tl.int32)
        for i in tl.static_range(CODES):
            code += (tl.load(levels + mark * CODES + i).to(tl.float32)[:, None] < values).to(tl.int32)
    low, high = tl.split(tl.reshape(code, [ROWS, BLOCK // 2, 2]))
    pair = tl.arange(0, BLOCK // 2)[None, :]
    tl.store(record[:, None] + pair, (low | (high << 4)).to(tl.uint8), mask=there[:, None] & (pair < SIZE // 2))
    bits = step.to(tl.int32, bitcast=True) >> 16
    tl.store(record + SIZE // 2, (bits & 255).to(tl.uint8), mask=there)
    tl.store(record + SIZE // 2 + 1, ((bits >> 8) & 255).to(tl.uint8), mask=there)
    tl.store(record + SIZE // 2 + 2, mark.to(tl.uint8), mask=there)


@triton.jit
def write_heads(
    qkv, cosine, sine, query_norm, key_norm, length, key_lattice, key_factors, key_levels, value_lattice, value_factors,
    value_levels, centre, query, keys, values, heads, kv_heads, capacity, width, turn, epsilon,
    TABLES: tl.constexpr, PLACES: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, NORMS: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """A program: HEADS heads of one row, of queries, keys, or values. turn: from a row of cos and sin to the next."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ROWS: tl.constexpr = HEADS * COUNT
    TYPE: tl.constexpr = qkv.dtype.element_ty
    each, within = tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    group = each % COUNT
    channel = group[:, None] * SIZE + within
    own, cosine, sine = qkv + row * (heads + 2 * kv_heads) * width, cosine + row * turn, sine + row * turn
    asking, keeping = tl.cdiv(heads, HEADS), tl.cdiv(kv_heads, HEADS)
    if block < asking:
        head = block * HEADS + each // COUNT
        inside = (within < SIZE) & (channel < width) & (head < heads)[:, None]
        x = own + (head * width)[:, None]
        x = _turned(x, query_norm, cosine, sine, channel, inside, width, epsilon, NORMS, TYPE, HEADS, COUNT, BLOCK)
        tl.store(query + row * heads * width + (head * width)[:, None] + channel, rounded_to(x, TYPE), mask=inside)
    else:
        head = (block - asking) % keeping * HEADS + each // COUNT
        there, groups = (head < kv_heads) & (group * SIZE < width), tl.cdiv(width, SIZE)
        inside = (within < SIZE) & (channel < width) & there[:, None]
        place = (row * kv_heads + head) * capacity + tl.load(length)
        record = (place * groups + group) * (SIZE // 2 + MARK)
        if block < asking + keeping:
            x = own + ((heads + head) * width)[:, None]
            x = _turned(x, key_norm, cosine, sine, channel, inside, width, epsilon, NORMS, TYPE, HEADS, COUNT, BLOCK)
            if CENTRE:
                x = rounded(x - tl.load(centre + (head * width)[:, None] + channel, mask=inside, other=0.0), TYPE)
            _write(x, keys + record, there, key_lattice, key_factors, key_levels, TABLES, PLACES, SIZE, ROWS, BLOCK)
        else:
            x = own + ((heads + kv_heads + head) * width)[:, None]
            x = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
            _write(x, values + record, there, value_lattice, value_factors, value_levels, TABLES, PLACES, SIZE, ROWS, BLOCK)


def tile(width: int, size: int) -> dict[str, Any]:
    """Constants of a program for heads of `width` channels in groups of `size`: 128, 64 -> 4 heads of 2 groups, 4 warps."""
    count, block = triton.next_power_of_2(-(-width // size)), triton.next_power_of_2(size)
    heads = max(1, _TILE // (count * block))
    warps = min(max(heads * count * block // 128, 1), 8)
    return {"SIZE": size, "HEADS": heads, "COUNT": count, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}


@operator(
    "append_records(Tensor qkv, Tensor cosine, Tensor sine, Tensor? query_norm, Tensor? key_norm, float epsilon, Tensor length, "
    "Tensor[] keys_by, Tensor[] values_by, Tensor? centre, int tables, int places, int size, Tensor(a!) query, Tensor(b!) keys, "
    "Tensor(c!) values)"
)
def _append_records(
    qkv: Tensor, cosine: Tensor, sine: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, epsilon: float, length: Tensor,
    keys_by: list[Tensor], values_by: list[Tensor], centre: Tensor | None, tables: int, places: int, size: int, query: Tensor,
    keys: Tensor, values: Tensor,
) -> None:  # fmt: skip
    (rows, heads, width), (_, kv_heads, capacity, _) = query.shape, keys.shape
    constants = tile(width, size)
    each = constants["HEADS"]
    write_heads[(-(-heads // each) + 2 * -(-kv_heads // each), rows)](
        qkv, cosine, sine, qkv if query_norm is None else query_norm, qkv if key_norm is None else key_norm, length, *keys_by,
        *values_by, qkv if centre is None else centre, query, keys, values, heads, kv_heads, capacity, width,
        width if len(cosine) == rows else 0, epsilon, TABLES=tables, PLACES=places, NORMS=query_norm is not None,
        CENTRE=centre is not None, **constants,
    )  # fmt: skip


def append_records(
    qkv: Tensor, angles: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor, float] | None, length: Tensor,
    by: tuple[RecordTables, RecordTables], query: Tensor, keys: Tensor, values: Tensor,
) -> None:  # fmt: skip
    """Writes the records of one new token per row behind the first `length`, and its queries.

    qkv: [rows, (heads + 2 * kv_heads) * head_dim], what the linears give. angles: cos and sin [rows or 1, head_dim]. norms:
    weights [head_dim] of those of queries and keys, and their epsilon. length: int32 [1], tokens so far. by: of keys and of
    values, alike in form and size. query: [rows, heads, head_dim], after norm and rotary embedding. keys, values: uint8 [rows,
    kv_heads, capacity, bytes], records as `format.kv_record` has them. Everything contiguous, floats in one dtype.
    """
    keys_by, values_by = by
    query_norm, key_norm, epsilon = (None, None, 0.0) if norms is None else norms
    lists = [[part.quantizer.lattice, part.quantizer.factors, part.values] for part in by]
    form = keys_by.quantizer
    if (form.count, form.places, keys_by.size) != (values_by.quantizer.count, values_by.quantizer.places, values_by.size):
        raise ValueError("keys and values are quantized in different forms; expected the same tables, bits and size")
    _append_records(
        qkv, *angles, query_norm, key_norm, epsilon, length, *lists, keys_by.centre, form.count, form.places, keys_by.size, query,
        keys, values,
    )  # fmt: skip
