"""The packed linear: thin, all arithmetic is in `format` and in the backends."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lbllm_cli.format.levels import empty_levels, empty_scale
from lbllm_cli.format.weights import PARTS, PackedWeight, group_count


class Holder(Protocol):
    """Who keeps the weights of some linears in a form of his own, and computes with them."""

    @property
    def device(self) -> torch.device:
        """Where they lie."""

    def packed(self, slot: int) -> PackedWeight:
        """The weights of one of them, bit for bit."""

    def output(self, slot: int, x: Tensor) -> Tensor:
        """Output of one of them: [..., in] -> [..., out]."""

    def runs_on(self, device: torch.device) -> bool:
        """Whether the form is one for a device."""


class PackedLinear(nn.Module):
    """A linear that keeps its weights as 2-bit codes and decodes them in every call.

    weight: uint8 [out, groups, group_size / 4]. levels: as a file has them, int8 [out, groups, 4] or, of 4 or 2 bits, uint8 [out,
    groups, 2 or 1]. scale: float16 [out, groups], or [out, 1] where levels have 2 bits.
    bias: [out] in the model's dtype, iff the source has one. Input [..., in] -> output [..., out], in the input's dtype.
    unit: who holds the weights in their place, repacked for a backend's kernels, or None.
    """

    weight: Tensor
    levels: Tensor
    scale: Tensor
    unit: Holder | None

    def __init__(self, in_features: int, out_features: int, group_size: int, bias: bool, level_bits: int = 8):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size, self.level_bits = group_size, level_bits
        groups = group_count(in_features, group_size)
        self.register_buffer("weight", torch.zeros(out_features, groups, group_size // 4, dtype=torch.uint8))
        self.register_buffer("levels", empty_levels(out_features, groups, level_bits))
        self.register_buffer("scale", empty_scale(out_features, groups, level_bits))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.unit = None
        self.slot = 0

    def repacked(self, unit: Holder, slot: int) -> None:
        """Leaves the weights to `unit`, which has them at `slot`."""
        self.unit, self.slot = unit, slot
        for part in PARTS:
            setattr(self, part, None)

    def packed(self) -> PackedWeight:
        """The weights, wherever they are."""
        if self.unit is not None:
            return self.unit.packed(self.slot)
        return PackedWeight.of_stored(self.weight, self.levels, self.scale, self.in_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        packed = self.packed()
        destination |= {prefix + part: tensor for part, tensor in zip(PARTS, packed.stored, strict=True)}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        """Other weights go where these were, and stay there: the linear then runs in torch."""
        if self.unit is not None and any(prefix + part in state_dict for part in PARTS):
            self._unpack()
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _unpack(self) -> None:
        """Takes the weights back from their holder."""
        self.weight, self.levels, self.scale = self.packed().stored
        self.unit = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves the scale but never casts it: `model.bfloat16()` would round every weight a second time.

        On a device that its holder does not run on weights are codes again.
        """
        if self.unit is not None:
            # A cast leaves it where it is: `model.bfloat16()` on a GPU is no move.
            if self.unit.runs_on(fn(torch.empty(0, dtype=torch.uint8, device=self.unit.device)).device):
                return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._unpack()
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != torch.float16:
            self.scale = scale.to(self.scale.device)
        return self

    def dense_weight(self) -> Tensor:
        """The decoded weight, float32 [out, in]."""
        return self.packed().values()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.unit is not None:
            return self.unit.output(self.slot, inputs)
        return linear(inputs, self.dense_weight().to(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"
