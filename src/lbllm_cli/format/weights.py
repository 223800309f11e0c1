"""The W(1+1) weight format: the only place that encodes or decodes it.

A group is `group_size` consecutive inputs of one row; the last group of a row may be shorter. A group has four
levels; a weight is a 2-bit code, sign + 2 x bitmap, that picks one of them (LBLLM, arXiv 2604.19167):

    bitmap 0: mu0 - alpha0 (code 0), mu0 + alpha0 (code 1)      the inner pair
    bitmap 1: mu1 - alpha1 (code 2), mu1 + alpha1 (code 3)      the outer pair

Stored: codes packed four to a byte, levels as integers of 8 or 4 bits, one float16 scale per (row, group); weight = scale *
level. Storing levels as integers is this project's choice, not the paper's: it makes integer kernels exact. Levels of 2 bits are
values of a table, and a row has one scale (`format.level_table`). In memory levels are int8, and every group has its scale,
however a file has them.

Fitting works on ranks: rank k is the k-th smallest of the group's four levels.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import torch
from torch import Tensor

from lbllm_cli.format.level_table import RANK_TO_CODE, pack_places, table_levels, unpack_places
from lbllm_cli.format.names import LEVEL_BITS, LEVELS, SHIFTS

# Where the largest level of a group lies on the grid of 4 bits, before it is rounded: the best of these is taken, 7.2 first. On
# levels about those of a normal distribution that makes 0.6 of the squared error that 7 alone does.
_TOPS = tuple(whole + beside for whole in (7.0, 6.0, 5.0) for beside in (0.2, 0.0, -0.2))
_CODE_TO_RANK = (1, 2, 0, 3)


def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """uint8 values on a device, made once: each time they are put on a GPU, it is waited for."""
    # What is made while a graph is traced has no values.
    return _new_table(values, device) if torch.compiler.is_compiling() else _kept_table(values, device)


def _new_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8, device=device)


_kept_table = cache(_new_table)


def group_count(in_features: int, group_size: int) -> int:
    """Groups in a row of `in_features` weights, a ragged last one included: (576, 128) -> 5."""
    return ceil(in_features / group_size)


def grouped(matrix: Tensor, group_size: int) -> Tensor:
    """Cuts rows into groups, zeros in the tail of a ragged last one: [2, 576], 128 -> [2, 5, 128]."""
    out_features, in_features = matrix.shape
    groups = group_count(in_features, group_size)
    padded = torch.nn.functional.pad(matrix, (0, groups * group_size - in_features))
    return padded.view(out_features, groups, group_size)


def level_max(level_bits: int) -> int:
    """Largest stored level: 8 -> 127, 4 -> 7."""
    return (1 << (level_bits - 1)) - 1


def per_row(level_bits: int) -> bool:
    """Whether a row has one scale, and not each of its groups."""
    return level_bits == LEVEL_BITS[2]


def scale_group(group_size: int, level_bits: int) -> int:
    """Inputs that share a scale; 0 for all of a row, as gcd(width, 0) is the width."""
    return 0 if per_row(level_bits) else group_size


def stored_grid(
    levels: Tensor, level_bits: int = 8, scale: Tensor | None = None, ascending: bool = True
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`project_levels` for levels that are known to fit, or are looked at later: the scale of others is infinite or NaN."""
    if not per_row(level_bits):
        return _fine_grid(levels) if level_bits == LEVEL_BITS[0] else _coarse_grid(levels.float())
    assert scale is not None
    whole = scale.expand(levels.shape[:-1])
    return table_levels(levels, whole, ascending), whole


def _fine_grid(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Levels of 8 bits: the scale that just reaches the largest one."""
    most = level_max(8)
    wanted = levels.abs().amax(dim=-1).float() / most
    scale = wanted.half()
    up = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(scale.float() < wanted * (1 - 2e-6), up, scale)
    stored = torch.round(levels.float() / _divisor(scale).unsqueeze(-1)).clamp_(-most, most)
    return stored.to(torch.int8), scale


def _coarse_grid(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Levels of 4 bits: the scale with the smallest squared error of the four, the first of equal ones.

    Training asks at every step: with the four levels of all groups behind each other it takes half as long as with those of a
    group side by side.
    """
    each, most = levels.movedim(-1, 0).contiguous(), level_max(4)
    largest = each.abs().amax(dim=0)
    scale, least = None, largest
    for top in _TOPS:
        tried = (largest / top).half()
        divisor = _divisor(tried)
        a, b, c, d = (each / divisor).round_().clamp_(-most, most).mul_(divisor).sub_(each).square_()
        error = (a + b).add_(c + d)
        if scale is None:
            scale, least = tried, error
        else:
            better = error < least
            scale, least = torch.where(better, tried, scale), torch.where(better, error, least)
    assert scale is not None
    return torch.round(levels / _divisor(scale).unsqueeze(-1)).clamp_(-most, most).to(torch.int8), scale


def _divisor(scale: Tensor) -> Tensor:
    """What levels are divided by: float32, 1 where the scale is 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale).float()


def project_levels(
    levels: Tensor, level_bits: int = 8, scale: Tensor | None = None, ascending: bool = True
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rounds levels to the stored grid.

    levels: float [..., groups, 4], weight units. scale: float16 [..., groups] or [..., 1], of levels of 2 bits, which are rounded
    in units of it; others find their own. ascending: how those of 2 bits are ordered, False for code order. Returns (int8 [...,
    groups, 4], float16 scale [..., groups]).
    With 8 bits the scale is max|level| / 127 rounded *up* to float16, and levels are rounded against that stored scale, so
    a subnormal scale costs resolution, not range. Rounding up ignores the last bits of float32: levels that come off
    the grid by one rounding error return to it. With 4 bits it is the best of nine from max|level| / 7.2 to max|level| / 4.8.
    [8, 5, 4] -> [8, 5, 4], [8, 5].

    Raises ValueError when a level is not finite or too large for a float16 scale.
    """
    stored, scale = stored_grid(levels, level_bits, scale, ascending)
    if not bool(torch.isfinite(scale).all()):
        reach = float(levels.abs().amax())
        raise ValueError(f"levels reach {reach:.3g}, the format holds at most {level_max(level_bits) * 65504:.3g}")
    return stored, scale


def level_values(levels: Tensor, scale: Tensor) -> Tensor:
    """Stored levels in weight units: int8 [..., groups, 4] and float16 [..., groups] -> float32 [..., groups, 4].

    Exact: 7 bits times 11 bits fit in float32. [8, 5, 4], [8, 5] -> [8, 5, 4].
    """
    return levels.float() * scale.float().unsqueeze(-1)


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


def pack_levels(levels: Tensor) -> Tensor:
    """Levels of 4 bits, two to a byte, the one of code 0 in the low half of the first: int8 [..., 4] -> uint8 [..., 2].

    As two's complement: (-7, -1, 1, 7) -> (0xF9, 0x71).
    """
    low, high = levels[..., 0::2], levels[..., 1::2]
    return (low & 15).to(torch.uint8) | ((high & 15).to(torch.uint8) << 4)


def unpack_levels(packed: Tensor) -> Tensor:
    """Inverse of `pack_levels`: uint8 [..., 2] -> int8 [..., 4]."""
    # Shifting the low half out of a signed byte and back extends its sign.
    as_signed = packed.view(torch.int8)
    return torch.stack(((as_signed << 4) >> 4, as_signed >> 4), dim=-1).flatten(-2)


def empty_levels(out_features: int, groups: int, level_bits: int) -> Tensor:
    """Room for the stored levels of a linear: int8 [out, groups, 4], with 4 or 2 bits uint8 [out, groups, 2 or 1]."""
    if level_bits == LEVEL_BITS[0]:
        return torch.zeros(out_features, groups, LEVELS, dtype=torch.int8)
    return torch.zeros(out_features, groups, LEVELS * level_bits // 8, dtype=torch.uint8)


def empty_scale(out_features: int, groups: int, level_bits: int) -> Tensor:
    """Room for the stored scales of a linear: float16 [out, groups], [out, 1] where levels have 2 bits."""
    return torch.zeros(out_features, 1 if per_row(level_bits) else groups, dtype=torch.float16)


def ordered(ranks: Tensor, levels: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Sorts levels and renames ranks so that every weight keeps its level.

    ranks: uint8 [out, in]. levels: float [out, groups, 4] in any order. Same shapes back.
    """
    ascending, order = levels.sort(dim=2)
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
