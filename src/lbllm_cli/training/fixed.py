"""A binarized linear in training whose codes never change."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lbllm_cli.format import weights as binarize
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.training.act_ste import kernels_of
from lbllm_cli.training.latent import starting_levels
from lbllm_cli.training.master import LEVELS, SCALES, Master
from lbllm_cli.training.ste import fixed_level


class Fixed(Master):
    """Codes that never change, packed uint8 [out, groups, size / 4], and levels [out, groups, 4] in code order.

    Arguments as for `Nearest`; there is no latent weight that a margin could mean. With scales trained, all levels of a group, or
    of a row where that has one scale, move by one factor, and the stored int8 levels stay what they are.
    """

    codes: Tensor

    def __init__(self, weight: Tensor, packed: PackedWeight, train: Collection[str]):
        super().__init__(weight, packed)
        self.register_buffer("codes", packed.codes)
        start = starting_levels(packed)
        self.levels = nn.Parameter(start.clone(), requires_grad=LEVELS in train)
        scales = start[..., :1] if self.row_scale is None else start[:, :1, :1]
        self.factor = nn.Parameter(torch.ones_like(scales)) if SCALES in train else None

    def kinds(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind, frozen ones included."""
        return {LEVELS: [self.levels]} if self.factor is None else {SCALES: [self.factor]}

    def forward(self) -> Tensor:
        codes = binarize.grouped(binarize.unpack_codes(self.codes, self.in_features), self.group_size)
        return fixed_level(codes, self._stored(self.levels, ascending=False)).flatten(1)[:, : self.in_features]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The present weights in a dtype, [out, in], differentiable."""
        if backend_of(self.codes.device).kernels is None:
            return self().to(dtype)
        return _decoded(self._stored(self.levels, ascending=False), self.codes, self.in_features, dtype)

    def put(self, weight: Tensor) -> None:
        if (kernels := backend_of(self.codes.device).kernels) is None:
            super().put(weight)
            return
        with torch.no_grad():
            kernels.decoded(self.codes, self._stored(self.levels, ascending=False), weight)

    def take(self, gradient: Tensor) -> None:
        if (kernels := backend_of(self.codes.device).kernels) is None:
            super().take(gradient)
            return
        levels = self._scaled(self.levels)
        if levels.requires_grad:
            torch.autograd.backward(levels, kernels.code_sums(gradient, self.codes))

    def constrain(self, dampening: float) -> None:
        """Nothing to keep in order: a level belongs to its code wherever it goes."""

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        """The present weights as a checkpoint holds them."""
        stored, scale = self._projected(self.levels, ascending=False)
        return PackedWeight(self.codes, stored, scale, self.in_features, self.level_bits)


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
