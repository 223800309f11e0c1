"""Keys and values as a cache stores them: a record of bytes per token and head, nothing in full precision.

Record of one token and head: for each group its codes, densely packed, the bfloat16 step (2 bytes), and one byte, the table it
took (knee) or its zero (uniform).
"""

import math

import torch
from torch import Tensor

from lbllm_cli.format.activations import (
    KV_STEP,
    Codes,
    Tables,
    dequantize,
    join_groups,
    pack_bits,
    quantize,
    split_groups,
    unpack_bits,
)

_MARK = KV_STEP.itemsize + 1


def _bits(tables: Tables) -> int:
    return (tables.levels.shape[1] - 1).bit_length()


def _packed_codes(tables: Tables, size: int) -> int:
    """Codes of a group with those that fill its last byte: 20 in 4 bits -> 20, 20 in 3 bits -> 24."""
    whole = 8 // math.gcd(_bits(tables), 8)
    return -(-size // whole) * whole


def record_bytes(tables: Tables, size: int) -> int:
    """Bytes of one group of `size` values: 64 in 4 bits -> 32 + 3."""
    return _packed_codes(tables, size) * _bits(tables) // 8 + _MARK


def write_record(x: Tensor, tables: Tables, size: int, piece: int | None = None) -> Tensor:
    """Quantizes keys or values [rows, heads, tokens, head_dim] to uint8 [rows, heads, tokens, groups * record_bytes].

    piece: see `format.activations.quantize`.
    """
    codes = quantize(split_groups(x, size), tables, KV_STEP, piece)
    filled = torch.nn.functional.pad(codes.codes, (0, _packed_codes(tables, size) - size))
    step = codes.step.to(KV_STEP).unsqueeze(-1).view(torch.uint8)
    mark = (codes.zero if tables.zero is None else codes.table.to(torch.uint8)).unsqueeze(-1)
    return torch.cat([pack_bits(filled, _bits(tables)), step, mark], dim=-1).flatten(-2)


def read_record(records: Tensor, tables: Tables, size: int, width: int) -> Tensor:
    """Inverse of `write_record`, to the values that the codes stand for: float32 [rows, heads, tokens, width]."""
    groups = records.unflatten(-1, (-1, record_bytes(tables, size)))
    codes = unpack_bits(groups[..., :-_MARK], _bits(tables))[..., :size]
    step = groups[..., -_MARK:-1].contiguous().view(KV_STEP).squeeze(-1).float()
    mark = groups[..., -1]
    table = torch.zeros_like(mark, dtype=torch.int64) if tables.zero is None else mark.long()
    zero = mark if tables.zero is None else tables.zero[table]
    return join_groups(dequantize(Codes(codes, step, zero, table), tables.levels), width)
