"""The activation quantizer by the compiled library: the same codes as `runtime.torch.quantizer` but where two candidates are
equally good; steps differ in the last bit, by the order of a sum.

On a Zen 4 processor it is 8 to 13 times as fast as torch, the gradients 10 to 17 times (scripts/bench_kernels.py).
"""

from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from lbllm_cli.engine.abi import library
from lbllm_cli.format.activations import Quantized, Tables
from lbllm_cli.runtime.cpu.library import DTYPES, pointer, quantizer_struct, supported


def native_quantized(x: Tensor, tables: Tables, step_dtype: torch.dtype = torch.float32) -> Quantized | None:
    """Quantizes groups: x float [..., size]. step_dtype: what steps are rounded to. [2, 7, 9, 64] -> values [2, 7, 9, 64], the
    rest [2, 7, 9]. None where the library does not have the quantizer.
    """
    lib = _library(tables)
    if lib is None or step_dtype not in DTYPES:
        return None
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
    x: Tensor, tables: Tables, found: Quantized, gradient: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None] | None:
    """`runtime.torch.quantizer.gradients` by the library; None where it does not have the quantizer.

    Raises ValueError for other shapes.
    """
    lib = _library(tables)
    if lib is None:
        return None
    groups = x.shape[:-1]
    shapes = [tuple(part.shape) for part in (gradient, *found)]
    expected = [tuple(x.shape)] * 2 + [tuple(groups)] * 3
    if shapes != expected:
        raise ValueError(f"expected gradient, values, steps, zeros and tables of shapes {expected}, got {shapes}")
    x, gradient, size = _readable(x), gradient.float().contiguous(), x.shape[-1]
    passed = torch.empty(x.shape) if wanted[0] else None
    sums_of = torch.empty(*groups, 3) if wanted[1] else None
    # A list: the library reads them after they are all made.
    floats = [part.float().contiguous() for part in (found.values, found.step)]
    before = [*floats, *(part.to(torch.int32).contiguous() for part in (found.zero, found.table))]
    pointers = map(pointer, (*before, gradient, passed, sums_of))
    struct, threads = byref(quantizer_struct(tables, size)), torch.get_num_threads()
    lib.lbllm_quantize_backward(struct, pointer(x), DTYPES[x.dtype], groups.numel(), *pointers, threads)
    return passed, sums_of


def _library(tables: Tables) -> Any | None:
    """The library, where it has the quantizer."""
    return library() if supported(tables) else None


def _readable(x: Tensor) -> Tensor:
    x = x.detach().contiguous()
    return x if x.dtype in DTYPES else x.float()
