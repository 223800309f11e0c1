"""A binarized linear in training whose codes never change."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lbllm_cli.format import weights as binarize
from lbllm_cli.format.levels import level_values
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.training.act_ste import kernels_of
from lbllm_cli.training.latent import starting_levels
from lbllm_cli.training.master import LEVELS, SCALES, Master
from lbllm_cli.training.ste import fixed_level


class Fixed(Master):
    """Codes that never change, packed uint8 [out, groups, size / 4], and levels [out, groups, 4] in code order.

    Arguments as for `Nearest`; there is no latent weight that a margin could mean. With scales trained, all levels of a group,
    or of a row where that has one scale, move by one factor, and the stored int8 levels stay what they are. With one scale a row
    they are all that is kept: in groups of 16, levels in float32 would be a byte for every weight.
    """

    codes: Tensor
    fixed: Tensor | None

    def __init__(self, weight: Tensor, packed: PackedWeight, train: Collection[str]):
        super().__init__(weight, packed)
        self.register_buffer("codes", packed.codes)
        of_rows = SCALES in train and self.row_scale is not None
        self.register_buffer("fixed", packed.levels if of_rows else None)
        self.levels = None if of_rows else nn.Parameter(starting_levels(packed), requires_grad=LEVELS in train)
        if SCALES in train:
            groups = 1 if of_rows else packed.levels.shape[1]
            self.factor = nn.Parameter(torch.ones(self.out_features, groups, 1, device=packed.codes.device))

    def kinds(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind, frozen ones included."""
        if self.factor is not None:
            return {SCALES: [self.factor]}
        assert self.levels is not None
        return {LEVELS: [self.levels]}

    def _values(self) -> Tensor:
        """The stored levels in weight units, [out, groups, 4], differentiable in what is trained."""
        if self.levels is None:
            return _in_units(self.factor, self.fixed, self.row_scale)
        return self._stored(self.levels, ascending=False)

    def _start(self) -> Tensor:
        """Levels that only their scale moves, in weight units, as they came. Rounded anew they are the same ones."""
        assert self.fixed is not None
        assert self.row_scale is not None
        return level_values(self.fixed, self.row_scale)

    def forward(self) -> Tensor:
        codes = binarize.grouped(binarize.unpack_codes(self.codes, self.in_features), self.group_size)
        return fixed_level(codes, self._values()).flatten(1)[:, : self.in_features]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The present weights in a dtype, [out, in], differentiable."""
        if backend_of(self.codes.device).kernels is None:
            return self().to(dtype)
        return _decoded(self._values(), self.codes, self.in_features, dtype)

    def put(self, weight: Tensor) -> None:
        if (kernels := backend_of(self.codes.device).kernels) is None:
            super().put(weight)
            return
        with torch.no_grad():
            kernels.decoded(self.codes, self._values(), weight)

    def take(self, gradient: Tensor) -> None:
        if (kernels := backend_of(self.codes.device).kernels) is None:
            super().take(gradient)
            return
        levels = self._values() if self.levels is None else self._scaled(self.levels)
        if levels.requires_grad:
            torch.autograd.backward(levels, kernels.code_sums(gradient, self.codes))

    @torch.no_grad()
    def constrain(self, dampening: float) -> None:
        """A level belongs to its code wherever it goes; a scale is not negative, in a checkpoint neither."""
        if self.factor is not None:
            self.factor.clamp_(min=0)

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        """The present weights as a checkpoint holds them."""
        stored, scale = self._projected(self._start() if self.levels is None else self.levels, ascending=False)
        return PackedWeight(self.codes, stored, scale, self.in_features, self.level_bits)


class _InUnits(Function):
    """Stored levels in units of their row's scale: factor float32 [out, 1, 1], levels int8 [out, groups, 4], scale float16
    [out, 1].

    Surrogate: factor * scale is not rounded to float16. (2, 1, 1), (2, 9, 4), (2, 1) -> (2, 9, 4). Kept for the way back are the
    int8 levels: of a whole model, their floats would be a byte for every weight.
    """

    @staticmethod
    def forward(ctx: Any, factor: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(levels, scale)
        return level_values(levels, (scale.float() * factor[..., 0]).half())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        levels, scale = ctx.saved_tensors
        return (grads[0] * levels).sum((1, 2), keepdim=True) * scale.float()[..., None], None, None


_in_units: Callable[[Any, Any, Any], Tensor] = _InUnits.apply


class _Decoded(Function):
    """`fixed_level` in kernels: levels [out, groups, 4], one for each packed code -> weights [out, in] in a dtype.

    Surrogate: levels[code], which is exact. (2, 9, 4), (2, 9, 16) -> (2, 576).
    """

    @staticmethod
    def forward(ctx: Any, levels: Tensor, codes: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(codes)
        weight = levels.new_empty(levels.shape[0], in_features, dtype=dtype)
        kernels_of(levels).decoded(codes, levels, weight)
        return weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (codes,) = ctx.saved_tensors
        return kernels_of(codes).code_sums(grads[0].contiguous(), codes), None, None, None


_decoded: Callable[[Tensor, Tensor, int, torch.dtype], Tensor] = _Decoded.apply
