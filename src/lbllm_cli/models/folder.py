"""Reading the tensors of a model folder, whole or by slices."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lbllm_cli.core.errors import RunError
from lbllm_cli.core.headers import Part, TensorEntry
from lbllm_cli.core.tensor_files import finite, first_not_finite

# Values that are looked at together where a tensor is not kept.
PIECE = 16 << 20


def read_tensors(entries: dict[str, TensorEntry], names: list[str], device: torch.device) -> dict[str, Tensor]:
    """Reads some tensors on to `device`, in the dtype on disk.

    Raises RunError naming the first tensor that holds NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted({entries[name].file for name in names}):
        with safe_open(file, framework="pt", device=str(device)) as handle:
            for name in names:
                if entries[name].file == file:
                    tensors[name] = _stored(handle, name, entries[name].part)
    if (bad := first_not_finite(tensors)) is not None:
        raise _not_finite(entries, bad)
    return tensors


def _stored(handle: Any, name: str, part: Part | None) -> Tensor:
    """A tensor of an open file; of a larger one no more is read than an index on its first axis."""
    if part is None:
        whole: Tensor = handle.get_tensor(name)
        return whole
    found: Tensor = handle.get_tensor(part.name) if part.index is None else handle.get_slice(part.name)[part.index]
    return part.of(found).contiguous()


def _not_finite(entries: dict[str, TensorEntry], name: str) -> RunError:
    return RunError(f"{name} in {entries[name].file} holds NaN or infinity; download the model again")


def _pieces(entry: TensorEntry, name: str) -> Iterator[Tensor]:
    """A tensor outside the blocks, which is stored whole, by its rows, on the CPU, about PIECE values at a time."""
    name = name if entry.part is None else entry.part.name
    with safe_open(entry.file, framework="pt") as handle:
        if not entry.shape:
            yield handle.get_tensor(name)
            return
        rows = handle.get_slice(name)
        step = max(1, PIECE // max(1, math.prod(entry.shape[1:])))
        for start in range(0, entry.shape[0], step):
            yield rows[start : start + step]


def check_finite(entries: dict[str, TensorEntry], names: list[str]) -> None:
    """Reads some tensors piece by piece and keeps nothing. Raises RunError naming the first with NaN or infinity."""
    for name in names:
        if not all(finite(piece) for piece in _pieces(entries[name], name)):
            raise _not_finite(entries, name)


def equal(entries: dict[str, TensorEntry], first: str, second: str, dtype: torch.dtype) -> bool:
    """Whether two stored tensors are the same as tensors of `dtype`. Stops reading at the first difference."""
    if entries[first].shape != entries[second].shape:
        return False
    pairs = zip(_pieces(entries[first], first), _pieces(entries[second], second), strict=True)
    return all(torch.equal(one.to(dtype), other.to(dtype)) for one, other in pairs)
