"""Levels as they are stored: integers of 8 or 4 bits and a scale for each group, or out of a table and a scale for each row."""

import torch
from torch import Tensor

from lbllm_cli.format.level_table import table_levels
from lbllm_cli.format.names import LEVEL_BITS, LEVELS

# Where the largest level of a group lies on the grid of 4 bits, before it is rounded: the best of these is taken, 7.2 first. On
# levels about those of a normal distribution that makes 0.6 of the squared error that 7 alone does.
_TOPS = tuple(whole + beside for whole in (7.0, 6.0, 5.0) for beside in (0.2, 0.0, -0.2))


def level_max(level_bits: int) -> int:
    """Largest stored level: 8 -> 127, 4 -> 7, 2 -> 127, of the table."""
    return 127 if per_row(level_bits) else (1 << (level_bits - 1)) - 1


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
    # A table has a value for anything: without this, training that has diverged would go on as if nothing were wrong.
    whole = torch.where(torch.isfinite(levels).all(dim=-1), scale, torch.nan)
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
