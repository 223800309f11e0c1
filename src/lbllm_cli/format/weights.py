"""The W(1+1) weight format: the only place that encodes or decodes it.

A group is `group_size` consecutive inputs of one row; the last group of a row may be shorter. A group has four
levels; a weight is a 2-bit code, sign + 2 x bitmap, that picks one of them (LBLLM, arXiv 2604.19167):

    bitmap 0: mu0 - alpha0 (code 0), mu0 + alpha0 (code 1)      the inner pair
    bitmap 1: mu1 - alpha1 (code 2), mu1 + alpha1 (code 3)      the outer pair

Stored: codes packed four to a byte, levels as integers of 8 or 4 bits, one float16 scale per (row, group); weight = scale *
level. Storing levels as integers is this project's choice, not the paper's: it makes integer kernels exact. Levels of 2 bits come
out of a table, and a row has one scale (`format.level_table`). Whatever a file has, a `PackedWeight` has int8 levels and
a scale for every group.

Fitting works on ranks: rank k is the k-th smallest of the group's four levels.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from lbllm_cli.format.kept import kept
from lbllm_cli.format.level_table import RANK_TO_CODE, pack_places, unpack_places
from lbllm_cli.format.levels import level_values, pack_levels, per_row, unpack_levels
from lbllm_cli.format.names import LEVEL_BITS, LEVELS, SHIFTS

_CODE_TO_RANK = (1, 2, 0, 3)


def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return kept(values, torch.uint8, device)


def group_count(in_features: int, group_size: int) -> int:
    """Groups in a row of `in_features` weights, a ragged last one included: (576, 128) -> 5."""
    return ceil(in_features / group_size)


def grouped(matrix: Tensor, group_size: int) -> Tensor:
    """Cuts rows into groups, zeros in the tail of a ragged last one: [2, 576], 128 -> [2, 5, 128]."""
    out_features, in_features = matrix.shape
    groups = group_count(in_features, group_size)
    padded = torch.nn.functional.pad(matrix, (0, groups * group_size - in_features))
    return padded.view(out_features, groups, group_size)


def dequantize(codes: Tensor, levels: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Weights the model runs with.

    codes: uint8 [out, in], 0..3. levels: int8 [out, groups, 4] in code order. scale: float16 [out, groups].
    Returns float32 [out, in]. out=2, in=576, group_size=128 -> levels [2, 5, 4], result [2, 576].
    """
    values = level_values(levels, scale).gather(2, grouped(codes, group_size).long())
    return values.flatten(1)[:, : codes.shape[1]]


def pack_codes(codes: Tensor, group_size: int) -> Tensor:
    """Packs codes four to a byte, column 4j+i of a group in bits 2i..2i+1 of byte j; the tail is padded with code 0.

    codes: uint8 [out, in]. Returns uint8 [out, groups, group_size / 4]; three axes, so that a loader that does not
    know the format fails on the shape. out=2, in=576, group_size=128 -> [2, 5, 32].
    """
    whole = grouped(codes, group_size)
    quads = whole.view(*whole.shape[:2], group_size // 4, 4)
    return quads[..., 0] | (quads[..., 1] << 2) | (quads[..., 2] << 4) | (quads[..., 3] << 6)


def unpack_codes(packed: Tensor, in_features: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [out, groups, group_size / 4] -> uint8 [out, in]."""
    codes = (packed.unsqueeze(-1) >> _table(SHIFTS, packed.device)) & 3
    return codes.flatten(1)[:, :in_features]


def ordered(ranks: Tensor, levels: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Sorts levels and renames ranks so that every weight keeps its level.

    ranks: uint8 [out, in]. levels: float [out, groups, 4] in any order. Same shapes back.
    """
    ascending, order = levels.sort(dim=2, stable=True)
    renamed = order.argsort(dim=2).to(torch.uint8)
    return renamed.gather(2, grouped(ranks, group_size).long()).flatten(1)[:, : ranks.shape[1]].contiguous(), ascending


def ranks_from_codes(codes: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `codes_from_ranks`: uint8 [..., n] and [..., groups, 4] in code order -> ranks, levels in rank order."""
    order = _table(RANK_TO_CODE, codes.device).long()
    return _table(_CODE_TO_RANK, codes.device)[codes.long()], levels.index_select(-1, order)


def codes_from_ranks(ranks: Tensor, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Turns a fit in rank order into the stored form in code order.

    ranks: uint8 [out, in]. levels: int8 [out, groups, 4] ascending. scale is unchanged and not returned.
    Returns (codes uint8 [out, in], levels int8 [out, groups, 4] in code order).

    Raises ValueError when the levels are not ascending, or a scale is not finite.
    """
    if scale.shape != levels.shape[:-1] or bool(((levels[..., 1:] < levels[..., :-1]).any(-1) | ~torch.isfinite(scale)).any()):
        raise ValueError("levels must ascend along the last axis, one scale per group, all of them finite")
    to_code = _table(RANK_TO_CODE, ranks.device)
    return to_code[ranks.long()], levels[..., _table(_CODE_TO_RANK, ranks.device).long()]


# What the tensors of a packed weight are called behind the name of their linear: codes have the name of what they stand for, in a
# shape that no loader takes for it.
PARTS = ("weight", "levels", "scale")


@dataclass(frozen=True)
class PackedWeight:
    """The stored weights of one linear.

    codes: uint8 [out, groups, group_size / 4]. levels: int8 [out, groups, 4] in code order. scale: float16 [out, groups].
    level_bits: that a file has of a level.
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor
    in_features: int
    level_bits: int = 8

    @classmethod
    def of_ranks(cls, ranks: Tensor, levels: Tensor, scale: Tensor, group_size: int, level_bits: int = 8) -> "PackedWeight":
        """A fit in rank order: ranks uint8 [out, in], levels int8 [out, groups, 4] ascending, scale float16 [out, groups].

        [2, 576] with group_size 128 -> codes [2, 5, 32]. Raises ValueError when the levels are not ascending.
        """
        codes, by_code = codes_from_ranks(ranks, levels, scale)
        return cls(pack_codes(codes, group_size), by_code, scale, ranks.shape[1], level_bits)

    @classmethod
    def of_stored(cls, codes: Tensor, levels: Tensor, scale: Tensor, in_features: int) -> "PackedWeight":
        """Out of tensors as a file has them: levels int8 [out, groups, 4], or of 4 or 2 bits, uint8 [out, groups, 2 or 1]."""
        if levels.dtype != torch.uint8:
            return cls(codes, levels, scale, in_features, 8)
        if levels.shape[-1] == LEVELS // 2:
            return cls(codes, unpack_levels(levels), scale, in_features, 4)
        return cls(codes, unpack_places(levels), scale.expand(levels.shape[:-1]), in_features, 2)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], owner: str, in_features: int) -> "PackedWeight":
        """Out of the tensors of a block or a file. owner: full name of the linear. Raises KeyError naming one that is absent."""
        codes, levels, scale = (tensors[f"{owner}.{part}"] for part in PARTS)
        return cls.of_stored(codes, levels, scale, in_features)

    @staticmethod
    def owners(names: Collection[str]) -> list[str]:
        """Full names of the packed linears among the names of some tensors."""
        return [owner for owner, _, part in (name.rpartition(".") for name in names) if part == PARTS[-1]]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of PARTS, levels int8."""
        return self.codes, self.levels, self.scale

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of PARTS, as a file has them."""
        if self.row_scale is not None:
            return self.codes, pack_places(self.levels), self.row_scale
        return self.codes, self.levels if self.level_bits == LEVEL_BITS[0] else pack_levels(self.levels), self.scale

    @property
    def row_scale(self) -> Tensor | None:
        """That of each row, where its levels have 2 bits: float16 [out, 1]."""
        return self.scale[:, :1].contiguous() if per_row(self.level_bits) else None

    @property
    def group_size(self) -> int:
        """Inputs that share four levels."""
        return self.codes.shape[2] * 4

    def scales_of(self, size: int) -> Tensor:
        """The scale of each `size` inputs, which divide a row and what shares a scale: float16 [out, in / size]."""
        count = self.in_features // size
        if self.row_scale is not None:
            return self.row_scale.repeat(1, count)
        return self.scale.repeat_interleave(self.group_size // size, dim=1)[:, :count].contiguous()

    def to_tensors(self, owner: str) -> dict[str, Tensor]:
        """Under their full names. owner: full name of the linear."""
        return {f"{owner}.{part}": tensor for part, tensor in zip(PARTS, self.stored, strict=True)}

    def moved(self, move: Callable[[Tensor], Tensor]) -> "PackedWeight":
        """With each tensor as `move` returns it, on another device."""
        codes, levels, scale = map(move, self.tensors)
        return replace(self, codes=codes, levels=levels, scale=scale)

    def split(self, sizes: list[int]) -> list["PackedWeight"]:
        """By rows, as linears that were fitted as one matrix are told apart again."""
        parts = (torch.split(tensor, sizes) for tensor in self.tensors)
        return [replace(self, codes=codes, levels=levels, scale=scale) for codes, levels, scale in zip(*parts, strict=True)]

    def unpacked(self) -> Tensor:
        """One code per weight: uint8 [out, in], 0..3."""
        return unpack_codes(self.codes, self.in_features)

    def whole_levels(self) -> Tensor:
        """Each weight's stored level, before its group's scale: int8 [out, in]."""
        return self.levels.gather(2, grouped(self.unpacked(), self.group_size).long()).flatten(1)[:, : self.in_features]

    def values(self) -> Tensor:
        """The weights that the model runs with: float32 [out, in]."""
        return dequantize(self.unpacked(), self.levels, self.scale, self.group_size)


def expected_bits(shapes: list[tuple[int, int]], group_size: int, level_bits: int = 8) -> float:
    """Bits per weight of the packed form: codes, levels and float16 scales, padding of ragged groups included.

    [(4096, 4096)], 128, 8 -> 2.375; with 4 -> 2.25; with 2 and groups of 16, 2.504.
    """
    of_row, of_group = (16, 0) if per_row(level_bits) else (0, 16)
    each = 2 * group_size + LEVELS * level_bits + of_group
    bits = sum(out * (group_count(inn, group_size) * each + of_row) for out, inn in shapes)
    return bits / sum(out * inn for out, inn in shapes)
