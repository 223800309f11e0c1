"""Where training starts: latents and bitmaps that reproduce given codes exactly and stay as close to the source as they can.

A compensated code is often not the level nearest to the source weight: with latents equal to the source weights the first
step would undo stage 1. A latent outside its code's cell is therefore moved to the cell's edge, or a margin inside.
"""

import torch
from torch import Tensor

from lbllm_cli.format.levels import level_max, level_values
from lbllm_cli.format.names import LEVEL_BITS
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.training.ste import HALF

# As a share of the way from the cell's edge to the level: with none, rounding could put a latent on the other side.
_LEAST_MARGIN = 1e-3


def starting_levels(packed: PackedWeight) -> Tensor:
    """Float levels that `project_levels` turns into exactly the stored ones: [out, groups, 4], in code order.

    Almost always their values. Where the scale is subnormal a smaller one may hold these values too, and be chosen for them: the
    largest level is then raised, by less than its rounding, to where only this scale holds it.
    """
    scale, values = packed.scale, level_values(packed.levels, packed.scale)
    if packed.level_bits != LEVEL_BITS[0]:
        # The scale is one that holds them without an error, whichever that is.
        return values
    largest = values.abs().amax(dim=-1, keepdim=True)
    below = torch.nextafter(scale, torch.zeros_like(scale)).float().unsqueeze(-1)
    bound = level_max(packed.level_bits) * below * (1 + 4e-6)
    return torch.where((values.abs() == largest) & (largest <= bound), bound * values.sign(), values)


def nearest_latents(weight: Tensor, levels: Tensor, ranks: Tensor, margin: float) -> Tensor:
    """The value nearest to each weight for which `nearest_ranks` gives `ranks`.

    weight: float32 [out, groups, size]. levels: [out, groups, 4] ascending. ranks: uint8 [out, groups, size].
    margin: least distance from the cell's edge, 0 to 1 of the way to the level. Same shape as weight.
    """
    margin = max(margin, _LEAST_MARGIN)
    middle = (levels[..., 1:] + levels[..., :-1]) / 2
    low = torch.cat([torch.full_like(middle[..., :1], -torch.inf), middle + margin * (levels[..., 1:] - middle)], dim=-1)
    high = torch.cat([middle - margin * (middle - levels[..., :-1]), torch.full_like(middle[..., :1], torch.inf)], dim=-1)
    index = ranks.long()
    return torch.clamp(weight, low.gather(2, index), high.gather(2, index))


def bitmap_latents(weight: Tensor, levels: Tensor, codes: Tensor, margin: float, bitmap_margin: float) -> tuple[Tensor, Tensor]:
    """Latent and relaxed bitmap for which `bitmap_codes` gives `codes`.

    The bitmap is where the weight lies between the inner level (0) and the outer level (1) of its sign.
    weight: float32 [out, groups, size]. levels: [out, groups, 4] in code order. codes: uint8 [out, groups, size].
    margin, bitmap_margin: least distance from a change of sign or bit, as a share of the way to the level, to 0 or 1. Returns
    two of weight's shape.
    """
    margin, bitmap_margin = (max(value, _LEAST_MARGIN) for value in (margin, bitmap_margin))
    signs = (codes & 1).long()
    mean = (levels[..., 0:1] + levels[..., 1:2]) / 2
    inner = levels[..., :2].gather(2, signs)
    outer = levels[..., 2:].gather(2, signs)
    # A pair of equal levels leaves no width; a little of the group's range keeps the latent on its side.
    reach = torch.maximum((inner - mean).abs(), 1e-3 * (levels[..., 3:] - levels[..., 2:3]).abs() + 1e-12)
    # A distance below the last bit of the mean would be none.
    distance = torch.maximum(margin * reach, 1e-6 * mean.abs())
    latent = torch.where(signs.bool(), torch.maximum(weight, mean + distance), torch.minimum(weight, mean - distance))
    width = outer - inner
    position = torch.where(width == 0, HALF, (weight - inner) / torch.where(width == 0, 1, width)).clamp(0, 1)
    edge = HALF * bitmap_margin
    bitmap = torch.where(codes > 1, position.clamp_min(HALF + edge), position.clamp_max(HALF - edge))
    return latent, bitmap
