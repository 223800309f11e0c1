"""The shape of a knee table: what places its levels, and what training moves."""

from itertools import pairwise
from typing import NamedTuple

import torch

from lbllm_cli.format.activations import Tables
from lbllm_cli.format.names import LATTICE_MAX


class Shape(NamedTuple):
    """One knee table: fine and coarse levels below and above zero, and coarse steps in units of the fine one."""

    fine_low: int
    fine_high: int
    coarse_low: int
    coarse_high: int
    ratio_low: int
    ratio_high: int

    @property
    def zero(self) -> int:
        """Z, the lattice place of zero."""
        return self.fine_low + self.ratio_low * self.coarse_low

    @property
    def top(self) -> int:
        """Largest lattice place."""
        return self.zero + self.fine_high + self.ratio_high * self.coarse_high

    def levels(self) -> list[int]:
        """T: Shape(2, 2, 1, 2, 3, 4) -> [0, 3, 4, 5, 6, 7, 11, 15], zero 5."""
        zero = self.zero
        low = [zero - self.fine_low - self.ratio_low * k for k in range(self.coarse_low, 0, -1)]
        high = [zero + self.fine_high + self.ratio_high * k for k in range(1, self.coarse_high + 1)]
        return [*low, *range(zero - self.fine_low, zero + self.fine_high + 1), *high]

    @classmethod
    def of(cls, levels: list[int], zero: int) -> "Shape":
        """A shape with these levels: [0, 3, 4, 5, 6, 7, 11, 15], 5 -> Shape(2, 2, 1, 2, 3, 4)."""
        steps = [b - a for a, b in pairwise(levels)]
        below, above = steps[: levels.index(zero)][::-1], steps[levels.index(zero) :]
        coarse = [[step for step in side if step > 1] for side in (below, above)]
        fine = [len(side) - len(large) for side, large in zip((below, above), coarse, strict=True)]
        return cls(*fine, *map(len, coarse), *(large[0] if large else 1 for large in coarse))

    def valid(self) -> bool:
        """Whether the table fits the lattice and has levels on the sides that it claims to have."""
        counts = self[:4]
        limit = max(LATTICE_MAX, sum(counts))  # 8 bits fill 0..255
        return min(counts) >= 0 and min(self.ratio_low, self.ratio_high) >= 1 and self.zero > 0 and self.zero < self.top <= limit


def tables_of(shapes: list[Shape], device: torch.device | None = None) -> Tables:
    """The quantizer with these tables."""
    levels = torch.tensor([shape.levels() for shape in shapes], dtype=torch.uint8, device=device)
    zero = torch.tensor([shape.zero for shape in shapes], dtype=torch.uint8, device=device)
    return Tables(levels, zero, torch.ones(len(shapes), 2, device=device))
