"""Attention of one new token per row over the records of a 4-bit cache, in parts of the tokens that are joined at the end.

Keys and values are decoded in the kernel to what `format.kv_record.read_record` gives, rounded to the dtype of computation as the
cache of transformers hands them out. Scores and their softmax are float32; weights of values are rounded before their product.
"""

# Kernels have the types of the compiler, which mypy does not know.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import math

import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.runtime.cuda.activations import TYPES, QuantizerTables
from lbllm_cli.runtime.cuda.fused import shape, store_places
from lbllm_cli.runtime.cuda.instructions import multiply_add, rounded_to
from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.records import CODES, MARK, RecordTables

# Tokens that a program decodes at once, and rows and columns that a matrix product has at least.
_TOKENS, _LEAST = 32, 16
# Programs that a GPU should have, and parts of a row's tokens that are joined at most.
_PROGRAMS, _PARTS_MAX = 512, 64


@triton.jit
def _decoded(code, step, mark, levels, TABLES: tl.constexpr, TYPE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """Values of codes [tokens, groups, pairs] in TYPE, [tokens, groups * pairs]. step, mark: [tokens, groups, 1]."""
    values = (code - mark).to(tl.float32) if TABLES == 0 else tl.load(levels + mark * CODES + code).to(tl.float32)
    return tl.reshape(rounded_to(values * step, TYPE), [TOKENS, COLUMNS])


@triton.jit
def _read(
    record, here, groups, levels,
    TABLES: tl.constexpr, TYPE: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Even and odd channels of a head, [TOKENS, COUNT * PAIRS] each. record: where each token begins, [TOKENS, 1, 1]."""
    group, pair = tl.arange(0, COUNT)[None, :, None], tl.arange(0, PAIRS)[None, None, :]
    own = record + group * (SIZE // 2 + MARK)
    there = here & (group < groups)
    codes = tl.load(own + pair, mask=there & (pair < SIZE // 2), other=0).to(tl.int32)
    bits = tl.load(own + SIZE // 2, mask=there, other=0).to(tl.int32)
    bits |= tl.load(own + (SIZE // 2 + 1), mask=there, other=0).to(tl.int32) << 8
    step = (bits << 16).to(tl.float32, bitcast=True)
    mark = tl.load(own + (SIZE // 2 + 2), mask=there, other=0).to(tl.int32)
    even = _decoded(codes & 15, step, mark, levels, TABLES, TYPE, TOKENS, COUNT * PAIRS)
    return even, _decoded(codes >> 4, step, mark, levels, TABLES, TYPE, TOKENS, COUNT * PAIRS)


@triton.jit
def _part(length, parts, TOKENS: tl.constexpr):
    """Tokens, the new one included, and how many of them a part has."""
    count = tl.load(length) + 1
    return count, tl.cdiv(tl.cdiv(count, parts), TOKENS) * TOKENS


@triton.jit
def attend_part(
    query, keys, values, mask, length, key_levels, value_levels, sums, weights, kv_heads, capacity, width, parts, scaling,
    TABLES: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """A program: the HEADS heads of a row that share one of keys, over a part of its tokens. ROWS: HEADS, filled up for tl.dot.

    scaling: of scores, to powers of 2. sums: float32 [rows, heads, parts, width], of values by weights that are not normalised.
    weights: float32 [rows, heads, parts, 2], the largest score and the sum of weights.
    """
    head, row, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    TYPE: tl.constexpr = query.dtype.element_ty
    count, span = _part(length, parts, TOKENS)
    if part * span < count:
        each, column = tl.arange(0, ROWS), tl.arange(0, COUNT * PAIRS)
        groups = tl.cdiv(width, SIZE)
        within = column % PAIRS
        channel = column // PAIRS * SIZE + 2 * within
        # Widths are even: where an even channel is, the next is too.
        inside = (each < HEADS)[:, None] & ((within < SIZE // 2) & (channel < width))[None, :]
        first = (row * kv_heads + head) * HEADS
        own = query + (first + each)[:, None] * width + channel[None, :]
        even, odd = tl.load(own, mask=inside, other=0.0), tl.load(own + 1, mask=inside, other=0.0)
        best, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        out_even, out_odd = tl.zeros([ROWS, COUNT * PAIRS], tl.float32), tl.zeros([ROWS, COUNT * PAIRS], tl.float32)
        for start in range(part * span, tl.minimum((part + 1) * span, count), TOKENS):
            token = start + tl.arange(0, TOKENS)
            attended = (token < count) & (tl.load(mask + row * capacity + token, mask=token < count, other=0) != 0)
            place = (((row * kv_heads + head) * capacity + token) * (groups * (SIZE // 2 + MARK)))[:, None, None]
            here = (token < count)[:, None, None]
            k_even, k_odd = _read(keys + place, here, groups, key_levels, TABLES, TYPE, SIZE, COUNT, PAIRS, TOKENS)
            score = multiply_add(even, tl.trans(k_even), tl.zeros([ROWS, TOKENS], tl.float32))
            score = multiply_add(odd, tl.trans(k_odd), score) * scaling
            score = tl.where(attended[None, :], score, float("-inf"))
            largest = tl.maximum(best, tl.max(score, 1))
            # Of a row that attends to nothing yet.
            base = tl.where(largest == float("-inf"), 0.0, largest)
            weight, kept = tl.exp2(score - base[:, None]), tl.exp2(best - base)
            best, total = largest, total * kept + tl.sum(weight, 1)
            weight = rounded_to(weight, TYPE)
            v_even, v_odd = _read(values + place, here, groups, value_levels, TABLES, TYPE, SIZE, COUNT, PAIRS, TOKENS)
            out_even = multiply_add(weight, v_even, out_even * kept[:, None])
            out_odd = multiply_add(weight, v_odd, out_odd * kept[:, None])
        at = (first + each) * parts + part
        tl.store(sums + at[:, None] * width + channel[None, :], out_even, mask=inside)
        tl.store(sums + at[:, None] * width + channel[None, :] + 1, out_odd, mask=inside)
        tl.store(weights + at * 2, best, mask=each < HEADS)
        tl.store(weights + at * 2 + 1, total, mask=each < HEADS)


@triton.jit
def join_parts(
    sums, weights, length, lattice, factors, found, step, heads, width, parts, groups, padded,
    TYPE: tl.constexpr, TABLES: tl.constexpr, PLACES: tl.constexpr, TOKENS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """A program: COUNT groups of the next linear's input, in the TYPE of computation, quantized."""
    row = tl.program_id(1).to(tl.int64)
    group, within = tl.program_id(0) * COUNT + tl.arange(0, COUNT), tl.arange(0, BLOCK)[None, :]
    column = group[:, None] * SIZE + within
    inside = (within < SIZE) & (column < heads * width)
    count, span = _part(length, parts, TOKENS)
    live = tl.cdiv(count, span)
    first = (row * heads + column // width) * parts
    best = tl.full(column.shape, float("-inf"), tl.float32)
    for part in range(live):
        best = tl.maximum(best, tl.load(weights + (first + part) * 2, mask=inside, other=0.0))
    base = tl.where(best == float("-inf"), 0.0, best)
    total, values = tl.zeros(column.shape, tl.float32), tl.zeros(column.shape, tl.float32)
    for part in range(live):
        kept = tl.exp2(tl.load(weights + (first + part) * 2, mask=inside, other=0.0) - base)
        total += kept * tl.load(weights + (first + part) * 2 + 1, mask=inside, other=0.0)
        values += kept * tl.load(sums + (first + part) * width + column % width, mask=inside, other=0.0)
    # The largest weight is 1, so a sum below is that of a row that attends to nothing: it gives zeros.
    values = values / tl.maximum(total, 1.0)
    values = tl.where(inside, rounded_to(values, TYPE).to(tl.float32), 0.0)
    store_places(values, lattice, factors, found, step, row, group, groups, padded, TABLES, PLACES, SIZE, BLOCK)


def parts_of(rows: int, kv_heads: int, capacity: int) -> int:
    """Parts that tokens are split into: 1 row of 8 heads, 4,096 tokens -> 64 of 64 tokens when all are there."""
    wanted = -(-_PROGRAMS // (rows * kv_heads))
    return max(1, min(wanted, _PARTS_MAX, capacity // (2 * _TOKENS)))


@operator(
    "attend_records(Tensor query, Tensor keys, Tensor values, Tensor mask, Tensor length, Tensor key_levels, "
    "Tensor value_levels, int tables, int size, float scaling, Tensor(a!) sums, Tensor(b!) weights)"
)
def _attend_records(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, length: Tensor, key_levels: Tensor, value_levels: Tensor,
    tables: int, size: int, scaling: float, sums: Tensor, weights: Tensor,
) -> None:  # fmt: skip
    (rows, heads, width), (_, kv_heads, capacity, _) = query.shape, keys.shape
    each, count = heads // kv_heads, triton.next_power_of_2(-(-width // size))
    attend_part[(kv_heads, rows, sums.shape[2])](
        query, keys, values, mask, length, key_levels, value_levels, sums, weights, kv_heads, capacity, width, sums.shape[2],
        scaling / math.log(2), TABLES=tables, SIZE=size, HEADS=each, ROWS=max(_LEAST, triton.next_power_of_2(each)), COUNT=count,
        PAIRS=max(triton.next_power_of_2(size // 2), _LEAST // count), TOKENS=_TOKENS, num_warps=4,
    )  # fmt: skip


@operator(
    "join_and_quantize(Tensor query, Tensor sums, Tensor weights, Tensor length, Tensor lattice, Tensor factors, int tables, "
    "int places, int size, Tensor(a!) found, Tensor(b!) step)"
)
def _join_and_quantize(
    query: Tensor, sums: Tensor, weights: Tensor, length: Tensor, lattice: Tensor, factors: Tensor, tables: int, places: int,
    size: int, found: Tensor, step: Tensor,
) -> None:  # fmt: skip
    rows, heads, parts, width = sums.shape
    grid, groups, constants = shape(rows, heads * width, found.shape[1], size)
    join_parts[grid](
        sums, weights, length, lattice, factors, found, step, heads, width, parts, groups, found.shape[1],
        TYPE=TYPES[query.dtype], TABLES=tables, PLACES=places, TOKENS=_TOKENS, **constants,
    )  # fmt: skip


def attend_records(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, length: Tensor, by: tuple[RecordTables, RecordTables],
    scaling: float, sums: Tensor, weights: Tensor,
) -> None:  # fmt: skip
    """Attention of one token per row over the first `length` and itself, in as many parts as `sums` has.

    query: [rows, heads, head_dim]. keys, values: uint8 [rows, kv_heads, capacity, bytes]. mask: uint8 [rows, capacity], 0 where a
    token is not attended to. length: int32 [1]. by: tables of keys and of values. scaling: of scores. sums: float32 [rows, heads,
    parts, head_dim], and weights, float32 [rows, heads, parts, 2], are for `join_and_quantize`. All of them contiguous.
    """
    levels, form = [part.values for part in by], by[0]
    _attend_records(query, keys, values, mask, length, *levels, form.quantizer.count, form.size, scaling, sums, weights)


def join_and_quantize(
    query: Tensor, sums: Tensor, weights: Tensor, length: Tensor, tables: QuantizerTables, size: int, places: Tensor, step: Tensor
) -> None:
    """Heads beside each other, rounded to the dtype of `query` and quantized; the rest as in `quantize_activations`."""
    form = (tables.lattice, tables.factors, tables.count, tables.places)
    _join_and_quantize(query, sums, weights, length, *form, size, places, step)
