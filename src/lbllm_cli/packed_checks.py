"""What a packed folder must hold before anything computes with it: kernels trust shapes and tables."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from lbllm_cli.activations import ActQuantizer
from lbllm_cli.errors import UsageError
from lbllm_cli.layers import PackedLinear
from lbllm_cli.ops.actquant import LATTICE_MAX
from lbllm_cli.source import read_header

_DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.int32: "I32"}


def _packed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear | ActQuantizer))


def check_files(model: nn.Module, paths: list[Path]) -> None:
    """Compares the headers of a folder's shards with what `model` will read from them.

    transformers itself fills a tensor that is absent with whatever lies in memory, and casts another dtype in silence. Raises
    ValueError naming the first tensor that is absent or of another shape or dtype, UsageError for a damaged shard.
    """
    entries = {name: entry for path in paths for name, entry in read_header(path).items()}
    for name, module in _packed(model):
        for part, tensor in module.named_buffers(recurse=False):
            entry, expected = entries.get(f"{name}.{part}"), (_DTYPES[tensor.dtype], tuple(tensor.shape))
            got = "nothing" if entry is None else f"{entry.dtype} {entry.shape}"
            if entry is None or (entry.dtype, entry.shape) != expected:
                raise ValueError(f"{name}.{part}: expected {expected[0]} {expected[1]}, got {got}; export it again")


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Around loading a model folder: raises UsageError that names the folder where it cannot be loaded."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{folder} cannot be loaded: {error}") from None


def check_values(model: nn.Module) -> None:
    """Raises ValueError naming a loaded tensor whose values have no meaning in the format."""
    for name, module in _packed(model):
        if isinstance(module, PackedLinear):
            if not bool(torch.isfinite(module.scale).all()):
                raise ValueError(f"{name}.scale holds NaN or infinity; export it again")
            continue
        levels, top = module.act_levels.int(), LATTICE_MAX if module.bits < 8 else 255
        if int(levels.max()) > top or bool((levels[:, 1:] <= levels[:, :-1]).any()):
            expected = f"rows that ascend within 0..{top}"
            raise ValueError(f"{name}.act_levels: expected {expected}, got {levels.tolist()}; export it again")
        if module.act_zero.numel() and not bool((levels == module.act_zero.int().unsqueeze(1)).any(1).all()):
            zeros = module.act_zero.tolist()
            raise ValueError(f"{name}.act_zero: expected one of act_levels in each row, got {zeros}; export it again")
