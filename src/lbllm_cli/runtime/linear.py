"""The packed linear: thin, all arithmetic is in ops and in the kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lbllm_cli.format.weights import LEVELS, decode, group_count

CANONICAL = ("weight", "levels", "scale")


class PackedLinear(nn.Module):
    """A linear that keeps its weights as 2-bit codes and decodes them in every call.

    weight: uint8 [out, groups, group_size / 4]. levels: int8 [out, groups, 4]. scale: float16 [out, groups].
    bias: [out] in the model's dtype, iff the source has one. Input [..., in] -> output [..., out], in the input's dtype.
    unit: the `kernels.unit.Unit` that holds the weights in their place, repacked for the compiled kernels, or None.
    """

    weight: Tensor
    levels: Tensor
    scale: Tensor
    unit: Any

    def __init__(self, in_features: int, out_features: int, group_size: int, bias: bool):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        groups = group_count(in_features, group_size)
        self.register_buffer("weight", torch.zeros(out_features, groups, group_size // 4, dtype=torch.uint8))
        self.register_buffer("levels", torch.zeros(out_features, groups, LEVELS, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(out_features, groups, dtype=torch.float16))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.unit = None
        self.slot = 0

    def repacked(self, unit: Any, slot: int) -> None:
        """Leaves the weights to `unit`, which has them at `slot`."""
        self.unit, self.slot = unit, slot
        for part in CANONICAL:
            setattr(self, part, None)

    def canonical(self) -> tuple[Tensor, Tensor, Tensor]:
        """weight, levels and scale, wherever they are."""
        return (self.weight, self.levels, self.scale) if self.unit is None else self.unit.canonical(self.slot)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + part: tensor for part, tensor in zip(CANONICAL, self.canonical(), strict=True)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves the scale but never casts it: `model.bfloat16()` would round every weight a second time.

        On another device than the CPU weights are codes again.
        """
        if self.unit is not None:
            if fn(torch.empty(0, dtype=torch.uint8)).device.type == "cpu":
                return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.weight, self.levels, self.scale = self.canonical()
            self.unit = None
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != torch.float16:
            self.scale = scale.to(self.scale.device)
        return self

    def dense_weight(self) -> Tensor:
        """The decoded weight, float32 [out, in]."""
        return decode(*self.canonical(), self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.unit is not None:
            output: Tensor = self.unit.output(self.slot, inputs)
            return output
        return linear(inputs, self.dense_weight().to(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"
