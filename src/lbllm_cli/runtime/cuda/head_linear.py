"""The model's head as a module: few rows through the kernel."""

import torch
from torch import Tensor, nn

from lbllm_cli.runtime.cuda.activations import TYPES
from lbllm_cli.runtime.cuda.head import ROWS_MAX, head_logits


class HeadLinear(nn.Linear):
    """A linear without bias."""

    @classmethod
    def of(cls, head: nn.Linear) -> "HeadLinear":
        """In the place of a head, with its very weight: a tied embedding stays tied."""
        with torch.device("meta"):
            made = cls(head.in_features, head.out_features, bias=False)
        made.weight = head.weight
        return made.train(head.training)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]; as torch computes it, where the kernel cannot."""
        weight = self.weight
        rows = input.numel() // max(1, input.shape[-1])
        runs = (
            0 < rows <= ROWS_MAX
            and self.bias is None
            and input.dtype == weight.dtype
            and input.dtype in TYPES
            and input.device == weight.device
            and weight.is_contiguous()
            and weight.dim() == 2
            and input.shape[-1] == weight.shape[1]
        )
        if not runs or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        out = input.new_empty(*input.shape[:-1], len(weight))
        head_logits(weight, input.reshape(rows, -1).contiguous(), out.view(rows, -1))
        return out
