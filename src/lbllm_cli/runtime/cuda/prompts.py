"""Keys and values of many tokens at once, written as records of a 4-bit cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbllm_cli.runtime.cuda.operators import operator
from lbllm_cli.runtime.cuda.records import MARK, RecordTables, _write, tile


@triton.jit
def write_all(
    x, records, lattice, factors, levels, total, width,
    TABLES: tl.constexpr, PLACES: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: HEADS of `total` heads, x [total, width] -> records, uint8 [total, groups * bytes]."""
    ROWS: tl.constexpr = HEADS * COUNT
    each, within = tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    group = each % COUNT
    head = (tl.program_id(0) * HEADS + each // COUNT).to(tl.int64)
    there, groups = (head < total) & (group * SIZE < width), tl.cdiv(width, SIZE)
    channel = group[:, None] * SIZE + within
    inside = (within < SIZE) & (channel < width) & there[:, None]
    values = tl.load(x + (head * width)[:, None] + channel, mask=inside, other=0.0).to(tl.float32)
    record = records + (head * groups + group) * (SIZE // 2 + MARK)
    _write(values, record, there, lattice, factors, levels, TABLES, PLACES, SIZE, ROWS, BLOCK)


@operator(
    "write_records(Tensor x, Tensor lattice, Tensor factors, Tensor levels, int tables, int places, int size, Tensor(a!) records)"
)
def _write_records(
    x: Tensor, lattice: Tensor, factors: Tensor, levels: Tensor, tables: int, places: int, size: int, records: Tensor
) -> None:
    width = x.shape[-1]
    total, form = x.numel() // width, tile(width, size)
    grid = (triton.cdiv(total, form["HEADS"]),)
    write_all[grid](x, records, lattice, factors, levels, total, width, TABLES=tables, PLACES=places, **form)


def write_records(x: Tensor, by: RecordTables) -> Tensor:
    """`format.kv_record.write_record`: x float [rows, heads, tokens, head_dim] -> uint8 [rows, heads, tokens, bytes]."""
    groups, form = -(-x.shape[-1] // by.size), by.quantizer
    records = torch.empty(*x.shape[:-1], groups * (by.size // 2 + MARK.value), dtype=torch.uint8, device=x.device)
    _write_records(x.contiguous(), form.lattice, form.factors, by.values, form.count, form.places, by.size, records)
    return records
