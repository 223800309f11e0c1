"""Uniform asymmetric codes of two bits, as stored: a scale of 16 bits and a zero point per group of a row."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lbllm_cli.core import files

BITS = 2
TOP = 2**BITS - 1


def uniform_bits(group: int, scale_bits: int = 16, zero_bits: int = BITS) -> float:
    """Bits of a weight: its code, and its share of the group's scale and zero point. 64 -> 2 + (16 + 2) / 64 = 2.28125."""
    return BITS + (scale_bits + zero_bits) / group


@dataclass(frozen=True)
class Codes:
    """A linear of [out, in]. codes: uint8 [out, groups, in / groups], 0 to 3; scale: float16 [out, groups, 1]; zero: uint8."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def values(self) -> Tensor:
        """(code - zero) * scale, float32 [out, in]."""
        return ((self.codes.float() - self.zero.float()) * self.scale.float()).flatten(1)


def on_grid(weight: Tensor, scale: Tensor, zero: Tensor) -> Codes:
    """Codes of weights that a library returned decoded, with the scale that a file holds.

    weight: float32 [out, in] = (code - zero) * scale; scale, zero: [out, groups], zero 0 to 3. Raises ValueError for weights off
    the grid, for then what was counted is not what was measured.
    """
    scale, zero = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
    steps = weight.float().view(*scale.shape[:2], -1) / scale + zero
    codes = steps.round()
    off, least, most = float((codes - steps).abs().max()), int(codes.min()), int(codes.max())
    if off > 0.02 or least < 0 or most > TOP or zero.min() < 0 or zero.max() > TOP:
        raise ValueError(f"expected codes 0 to {TOP}, got {least} to {most}, up to {off:.3f} steps off")
    return Codes(codes.to(torch.uint8), scale.to(torch.float16), zero.to(torch.uint8))


def write_codes(path: Path, found: dict[str, Codes]) -> None:
    """Codes of several linears by name, atomically."""
    tensors = {f"{name}.{part}": getattr(codes, part) for name, codes in found.items() for part in ("codes", "scale", "zero")}
    files.write_atomic(path, lambda temporary: save_file(tensors, temporary))


def read_codes(path: Path) -> dict[str, Codes]:
    """What `write_codes` wrote."""
    tensors = load_file(path)
    names = [key.removesuffix(".scale") for key in tensors if key.endswith(".scale")]
    return {name: Codes(*(tensors[f"{name}.{part}"] for part in ("codes", "scale", "zero"))) for name in names}
