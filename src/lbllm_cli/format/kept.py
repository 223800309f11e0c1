"""Constants as tensors on a device."""

from functools import cache
from typing import Any

import torch
from torch import Tensor


def kept(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tuple of numbers, or of tuples of them, made once for each device: each time they are put on a GPU, it is waited for."""
    # What is made while a graph is traced has no values.
    return _made(values, dtype, device) if torch.compiler.is_compiling() else _made_once(values, dtype, device)


def _made(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


_made_once = cache(_made)
