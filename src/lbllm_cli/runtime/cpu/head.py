"""The model's head for few tokens: a product that is bound by the bandwidth of memory."""

from ctypes import byref

import torch
from torch import Tensor, nn

from lbllm_cli.engine.abi import Rows, library
from lbllm_cli.runtime.cpu.library import DTYPES, pointer

# Above, torch's matrix product is faster.
ROWS_MAX = 4


class HeadLinear(nn.Linear):
    """A linear without bias, in bfloat16 or float32."""

    @classmethod
    def of(cls, head: nn.Linear) -> "HeadLinear":
        """In the place of a head, with its very weight: a tied embedding stays tied."""
        with torch.device("meta"):
            made = cls(head.in_features, head.out_features, bias=False)
        made.weight = head.weight
        return made.train(head.training)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]; as torch computes it, where the library cannot."""
        rows = input.numel() // self.in_features
        lib = library()
        runs = lib is not None and rows <= ROWS_MAX and self.weight.dtype in DTYPES and self.weight.is_contiguous()
        runs = (
            runs
            and self.bias is None
            and self.weight.shape == (self.out_features, self.in_features)
            and input.shape[-1] == self.in_features
            and input.dtype in DTYPES
            and input.device == self.weight.device == torch.device("cpu")
        )
        if not runs or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        assert lib is not None
        x = input.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        shape = (self.in_features, self.out_features, DTYPES[x.dtype], rows, torch.get_num_threads())
        lib.lbllm_head(byref(Rows(pointer(self.weight), None, DTYPES[self.weight.dtype])), pointer(x), pointer(y), *shape)
        return y
