"""What of torch goes to the compiled library: dtypes, addresses of tensors, tables of quantizers."""

import torch
from torch import Tensor

from lbllm_cli.engine import abi
from lbllm_cli.format.activations import Tables

DTYPES = {torch.float32: abi.FLOAT32, torch.bfloat16: abi.BFLOAT16}


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous CPU tensor."""
    return None if tensor is None else tensor.data_ptr()


def _plain(tables: Tables) -> list[abi.Table]:
    zeros = [None] if tables.zero is None else tables.zero.tolist()
    clips = [(above, below) for above, below in tables.clip.tolist()]
    return [abi.Table(*parts) for parts in zip(tables.levels.tolist(), zeros, clips, strict=True)]


def supported(tables: Tables, cached: bool = False) -> bool:
    """Whether the library has this quantizer: see `abi.fits`."""
    return abi.fits(_plain(tables), cached)


def quantizer_struct(tables: Tables, size: int) -> abi.Quantizer:
    """A quantizer as the library reads it: see `abi.quantizer`."""
    return abi.quantizer(_plain(tables), size)
