"""Straight-through estimators: weights that sit on their group's levels, with gradients for what chose them.

Everything is grouped: latents, bitmaps and weights are float32 [out, groups, group_size]; what lies in the tail of a ragged last
group is never read and gets no gradient.
A surrogate says what the backward pass differentiates; codes are constants in it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lbllm_cli.format.levels import level_values, project_levels, stored_grid
from lbllm_cli.format.names import LEVELS
from lbllm_cli.runtime.backend import backend_of

HALF = 0.5


def nearest_ranks(latent: Tensor, levels: Tensor) -> Tensor:
    """Rank of the level nearest to each latent; halfway between two levels is the lower one's.

    latent: [out, groups, size]. levels: [out, groups, 4] ascending. Returns uint8 [out, groups, size].
    """
    middle = (levels[..., 1:] + levels[..., :-1]) / 2
    ranks = (latent > middle[..., 0:1]).to(torch.uint8)
    for k in (1, 2):
        ranks += latent > middle[..., k : k + 1]
    return ranks


def bitmap_codes(latent: Tensor, bitmap: Tensor, inner_mean: Tensor) -> Tensor:
    """Code of each weight, sign + 2 x bit: the sign says on which side of the inner pair's mean the latent lies.

    latent, bitmap: [out, groups, size]. inner_mean: mu0, [out, groups]. Returns uint8 [out, groups, size].
    """
    codes = (bitmap > HALF).to(torch.uint8)
    codes *= 2
    codes += latent > inner_mean.unsqueeze(-1)
    return codes


def sums_per_level(grad: Tensor, codes: Tensor) -> Tensor:
    """Sum of `grad` over the weights of each level: [out, groups, size] -> [out, groups, 4], level order that of the codes."""
    if backend_of(grad.device).scatters:
        return grad.new_zeros(*grad.shape[:2], LEVELS).scatter_add_(2, codes.long(), grad)
    # On a GPU every group's weights would queue for four addresses, in an order that changes from run to run.
    return torch.stack([(grad * (codes == level)).sum(-1) for level in range(LEVELS)], dim=-1)


class NearestLevel(Function):
    """Each latent's nearest level.

    latent: [out, groups, size]. levels: [out, groups, 4] ascending -> weights [out, groups, size].
    Surrogate: levels[rank] + (latent - latent0), ranks and latent0 as in the forward pass. (2, 9, 64), (2, 9, 4) -> (2, 9, 64).
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, levels: Tensor) -> Tensor:
        ranks = nearest_ranks(latent, levels)
        ctx.save_for_backward(ranks)
        return levels.gather(2, ranks.long())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (ranks,) = ctx.saved_tensors
        wants_latent, wants_levels = ctx.needs_input_grad
        return grads[0] if wants_latent else None, sums_per_level(grads[0], ranks) if wants_levels else None


class BitmapLevel(Function):
    """The level that sign and bitmap choose (LBLLM's training form).

    latent, bitmap: [out, groups, size]. levels: [out, groups, 4] in code order -> weights [out, groups, size].
    Surrogate: (1 - bitmap) * levels[sign] + bitmap * levels[sign + 2] for the bitmap's gradient, levels[code] for the levels',
    levels[code] + (latent - latent0) for the latent's. The sign's threshold moves with the levels, without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, bitmap: Tensor, levels: Tensor) -> Tensor:
        codes = bitmap_codes(latent, bitmap, (levels[..., 0] + levels[..., 1]) / 2)
        ctx.save_for_backward(codes, levels)
        return levels.gather(2, codes.long())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        codes, levels = ctx.saved_tensors
        wants_latent, wants_bitmap, wants_levels = ctx.needs_input_grad
        bitmap = None
        if wants_bitmap:
            outer_minus_inner = levels[..., 2:] - levels[..., :2]
            bitmap = outer_minus_inner.gather(2, (codes & 1).long()).mul_(grads[0])
        return grads[0] if wants_latent else None, bitmap, sums_per_level(grads[0], codes) if wants_levels else None


class FixedLevel(Function):
    """The level of each weight's code, where codes never change.

    codes: uint8 [out, groups, size]. levels: [out, groups, 4] in code order -> weights [out, groups, size].
    Surrogate: levels[code], which is exact. (2, 9, 64), (2, 9, 4) -> (2, 9, 64).
    """

    @staticmethod
    def forward(ctx: Any, codes: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        return levels.gather(2, codes.long())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (codes,) = ctx.saved_tensors
        return None, sums_per_level(grads[0], codes)


class StoredLevels(Function):
    """Levels rounded to what the checkpoint holds, integers times a float16 scale: [..., groups, 4] -> the same shape.

    scale, ascending: see `project_levels`. Surrogate: the identity.
    """

    @staticmethod
    def forward(ctx: Any, levels: Tensor, level_bits: int, scale: Tensor | None, ascending: bool) -> Tensor:
        backend = backend_of(levels.device)
        if backend.kernels is not None:
            if scale is not None:
                return backend.kernels.table_levels(levels, scale, ascending)
            return backend.kernels.stored_levels(levels, level_bits)
        # Whether all are finite is not looked at where that means to wait: the loss tells.
        grid = project_levels if backend.shares_ram else stored_grid
        return level_values(*grid(levels, level_bits, scale, ascending))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


class Rounded(Function):
    """A master as its stored dtype holds it, in the master's dtype.

    Surrogate: the identity. (576,) -> (576,).
    """

    @staticmethod
    def forward(ctx: Any, master: Tensor, dtype: torch.dtype) -> Tensor:
        return master.to(dtype).to(master.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


nearest_level: Callable[[Tensor, Tensor], Tensor] = NearestLevel.apply
bitmap_level: Callable[[Tensor, Tensor, Tensor], Tensor] = BitmapLevel.apply
fixed_level: Callable[[Tensor, Tensor], Tensor] = FixedLevel.apply
stored_levels: Callable[[Tensor, int, Tensor | None, bool], Tensor] = StoredLevels.apply
rounded: Callable[[Tensor, torch.dtype], Tensor] = Rounded.apply


def polarisation(bitmap: Tensor, beta: float) -> float:
    """Mean of 1 - |2 G - 1|^beta: 1 where every G is 1/2, 0 where every bit is certain (LBLLM's second loss term)."""
    return float((1 - (2 * bitmap - 1).abs().pow(beta)).mean())


def polarisation_gradient(bitmap: Tensor, beta: float, count: int) -> Tensor:
    """Gradient of the mean over `count` weights of 1 - |2 G - 1|^beta, the padding of ragged groups not counted.

    bitmap: [out, groups, size] in [0, 1]. beta >= 1. Same shape back.
    """
    centred = 2 * bitmap - 1
    if beta == 2:
        return centred.mul_(-4.0 / count)
    return centred.abs().pow_(beta - 1).mul_(centred.sign()).mul_(-2.0 * beta / count)
