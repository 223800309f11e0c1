"""The activation quantizer where values are wanted and not codes: by the library on a CPU, in torch (`ops.actquant`) elsewhere.

Both choose the same codes but where two candidates are equally good; steps differ in the last bit, by the order of a sum. On a
Zen 4 processor the library is 8 to 13 times as fast as torch, the gradients 10 to 17 times (bench_kernels.py).
"""

from ctypes import byref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbllm_cli.format.activations import Tables, dequantize, quantize
from lbllm_cli.runtime.cpu.library import DTYPES, library, pointer, quantizer_struct, supported


class Quantized(NamedTuple):
    """Groups after quantization.

    values: float32 [..., size], d * (T - Z). step: float32 [...], d. zero: integers [...], Z. table: integers [...], which table
    the group took.
    """

    values: Tensor
    step: Tensor
    zero: Tensor
    table: Tensor


def quantized(x: Tensor, tables: Tables, step_dtype: torch.dtype = torch.float32) -> Quantized:
    """Quantizes groups: x float [..., size]. step_dtype: what steps are rounded to. [2, 7, 9, 64] -> values [2, 7, 9, 64], the
    rest [2, 7, 9].
    """
    lib = _library(x, tables)
    if lib is None or step_dtype not in DTYPES:
        codes = quantize(x, tables, step_dtype)
        return Quantized(dequantize(codes, tables.levels), codes.step, codes.zero, codes.table)
    x, size = _readable(x), x.shape[-1]
    groups = x.shape[:-1]
    found = Quantized(
        torch.empty(x.shape), torch.empty(groups), torch.empty(groups, dtype=torch.int32), torch.empty(groups, dtype=torch.int32)
    )
    outputs = (None, *map(pointer, found))
    counts = DTYPES[x.dtype], groups.numel(), size
    struct, threads = byref(quantizer_struct(tables, size)), torch.get_num_threads()
    lib.lbllm_quantize(struct, pointer(x), *counts, *outputs, DTYPES[step_dtype], threads)
    return found


def native_gradients(
    x: Tensor, tables: Tables, found: Quantized, gradient: Tensor, inputs: bool, sums: bool
) -> tuple[Tensor | None, Tensor | None] | None:
    """`ops.act_ste.gradients` by the library; None where it does not have the quantizer. Raises ValueError for other shapes."""
    lib = _library(x, tables)
    if lib is None:
        return None
    groups = x.shape[:-1]
    shapes = [tuple(part.shape) for part in (gradient, *found)]
    expected = [tuple(x.shape)] * 2 + [tuple(groups)] * 3
    if shapes != expected:
        raise ValueError(f"expected gradient, values, steps, zeros and tables of shapes {expected}, got {shapes}")
    x, gradient, size = _readable(x), gradient.float().contiguous(), x.shape[-1]
    passed = torch.empty(x.shape) if inputs else None
    sums_of = torch.empty(*groups, 3) if sums else None
    # A list: the library reads them after they are all made.
    floats = [part.float().contiguous() for part in (found.values, found.step)]
    before = [*floats, *(part.to(torch.int32).contiguous() for part in (found.zero, found.table))]
    pointers = map(pointer, (*before, gradient, passed, sums_of))
    struct, threads = byref(quantizer_struct(tables, size)), torch.get_num_threads()
    lib.lbllm_quantize_backward(struct, pointer(x), DTYPES[x.dtype], groups.numel(), *pointers, threads)
    return passed, sums_of


def _library(x: Tensor, tables: Tables) -> Any | None:
    """The library, where it can quantize x."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not supported(tables):
        return None
    return library()


def _readable(x: Tensor) -> Tensor:
    x = x.detach().contiguous()
    return x if x.dtype in DTYPES else x.float()
