"""Embedding and head in 8 bits: a symmetric integer a weight, and a float16 scale for each row, that is for each token.

Stored beside each other as `<name>.weight`, int8 [rows, width], and `<name>.scale`, float16 [rows]; weight = scale * integer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lbllm_cli.format.names import ROW_LEVEL_MAX

# Values that are worked on at once: a table of a large vocabulary has gigabytes in float32.
_PIECE = 1 << 24
_SMALLEST_SCALE = torch.finfo(torch.float16).smallest_normal * 2.0**-10


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and scales of rows: float [rows, width] -> int8 [rows, width], float16 [rows].

    The scale reaches a row's largest value: on 49,152 rows of 576 smaller ones have more error. Raises ValueError for a row that
    float16 has no scale for. [[0.5, -1.27]] -> [[50, -127]], [0.01].
    """
    codes, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), dtype=torch.float16)
    for start, piece in _pieces(weight):
        rows = piece.float().cpu()
        scale = (rows.abs().amax(1) / ROW_LEVEL_MAX).to(torch.float16)
        if not bool(torch.isfinite(scale).all()):
            raise ValueError("a row has values that 8 bits and a float16 scale do not reach")
        inverse = torch.where(scale.float() >= _SMALLEST_SCALE, scale.float(), torch.inf).reciprocal()
        levels = (rows * inverse.unsqueeze(1)).round_().clamp_(-ROW_LEVEL_MAX, ROW_LEVEL_MAX)
        codes[start : start + len(rows)], scales[start : start + len(rows)] = levels.to(torch.int8), scale
    return codes, scales


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantize_rows`, rounded once to `dtype`: int8 [rows, width], float16 [rows] -> [rows, width]."""
    found = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for start, piece in _pieces(codes):
        rows = slice(start, start + len(piece))
        found[rows] = piece.float().mul_(scales[rows].float().unsqueeze(1)).to(dtype)
    return found


def _pieces(table: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, _PIECE // max(1, table.shape[1]))
    return ((start, table[start : start + step]) for start in range(0, len(table), step))
