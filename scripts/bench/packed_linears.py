"""Linears of any shape with random packed weights, in the kernels."""

import torch
from random_models import FORMAT, GROUP, fill

from lbllm_cli.format.names import input_name
from lbllm_cli.runtime.cuda.unit import CudaUnit
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import empty_quantizer


def packed_linear(width: int, out: int, kind: str) -> CudaUnit:
    """A unit of one linear on the GPU: [..., width] -> [..., out]. kind: A4, its inputs quantized, or A16."""
    device = torch.device("cuda")
    with device:
        linear = PackedLinear(width, out, GROUP, bias=False)
        by = empty_quantizer(FORMAT, input_name(("linear",)), width) if kind == "A4" else None
    for module in (linear, by):
        if module is not None:
            fill(module, device)
    return CudaUnit([linear], by)
