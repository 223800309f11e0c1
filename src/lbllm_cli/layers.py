"""The packed linear: thin, all arithmetic is in ops."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lbllm_cli.ops.binarize import LEVELS, decode, group_count


class PackedLinear(nn.Module):
    """A linear that keeps its weights as 2-bit codes and decodes them in every call.

    weight: uint8 [out, groups, group_size / 4]. levels: int8 [out, groups, 4]. scale: float16 [out, groups].
    bias: [out] in the model's dtype, iff the source has one. Input [..., in] -> output [..., out], in the input's dtype.
    """

    weight: Tensor
    levels: Tensor
    scale: Tensor

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves the scale but never casts it: `model.bfloat16()` would round every weight a second time."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != torch.float16:
            self.scale = scale.to(self.scale.device)
        return self

    def dense_weight(self) -> Tensor:
        """The decoded weight, float32 [out, in]."""
        return decode(self.weight, self.levels, self.scale, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.dense_weight().to(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"
