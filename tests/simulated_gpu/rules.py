"""What CUDA refuses, and what this project refuses beside it.

Of the first kind an operator raises at once, as torch with CUDA does. The second kind is written down, with the line of the
package that broke the rule, and whoever runs a program on the simulated device looks at the list when it has ended.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from simulated_gpu.accounting import site
from torch import Tensor
from torch._ops import OpOverload

# Uploads of more bytes than this have to come from pinned memory wherever hidden states pass or steps are taken.
PAGEABLE = 64 << 10
# A training step, and a pass of hidden states.
STEP, PASS = "training step", "pass of hidden states"

_COPIES = {"aten.copy_", "aten._to_copy"}
_INDEXED = {"aten.index", "aten._unsafe_index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}
# Not pointwise, but a number may lie on the CPU.
_NUMBERS = {"aten.fill_", "aten.fill", "aten.masked_fill", "aten.masked_fill_", "aten.index_fill", "aten.index_fill_"}
# The size of what they give is known only when the device is done.
_SIZES = {"aten.nonzero", "aten.masked_select", "aten._unique2", "aten.unique_dim", "aten.unique_consecutive", "aten.bincount"}


class DeviceMismatch(RuntimeError):
    """Tensors of two devices in one operator."""


class Rules:
    """What was broken, by rule and line, and which kinds of regions the program is in."""

    def __init__(self) -> None:
        self.broken: Counter[tuple[str, str]] = Counter()
        self.open: Counter[str] = Counter()

    def complain(self, text: str) -> None:
        """A rule of the project's was broken."""
        self.broken[text, site()] += 1

    @contextmanager
    def within(self, region: str) -> Iterator[None]:
        """While the program is in a region."""
        self.open[region] += 1
        try:
            yield
        finally:
            self.open[region] -= 1

    def uploaded(self, size: int, pinned: bool, non_blocking: bool) -> None:
        """A copy to the device. size: bytes."""
        if non_blocking and not pinned:
            self.complain("a non-blocking copy from memory that is not pinned")
        if size > PAGEABLE and not pinned and (where := next((region for region in (STEP, PASS) if self.open[region]), None)):
            self.complain(f"more than 64 KiB are copied to the device from memory that is not pinned, in a {where}")

    def synchronised(self, kind: str) -> None:
        """The host waited for the device."""
        if self.open[STEP] and computes():
            self.complain(f"a training step waits for the device: {kind}")


def computes() -> bool:
    """Whether this thread is the program's own, or autograd's, which that waits for: not one of a pool."""
    return not threading.current_thread().name.startswith("ThreadPoolExecutor")


def synchronises(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an operator waits for the device to know the shape of its result."""
    if name in ("aten.index", "aten._unsafe_index"):
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in _indices(args[1]))
    if name in ("aten.index_put", "aten.index_put_", "aten._index_put_impl_"):
        # A number for all that a mask says needs no count of them.
        masks = [index for index in _indices(args[1]) if index.dtype in (torch.bool, torch.uint8)]
        accumulates = len(args) > 3 and bool(args[3])
        return bool(masks) and (accumulates or _elements(args[2]) > 1)
    return name in _SIZES or (name == "aten.repeat_interleave" and len(args) == 1)


def _indices(given: Any) -> list[Tensor]:
    return [index for index in given if isinstance(index, Tensor)] if isinstance(given, list | tuple) else []


def _elements(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 1


def check_devices(
    function: OpOverload, name: str, args: tuple[Any, ...], here: list[Tensor], elsewhere: list[Tensor], written: list[Tensor]
) -> None:
    """Raises DeviceMismatch for tensors of the CPU where CUDA takes none. here: on the device. written: of all, what changes."""
    if here and elsewhere and name not in _COPIES and not _mixes(function, name, args, elsewhere, written):
        shapes = [*((tuple(x.shape), "cuda:0") for x in here), *((tuple(x.shape), "cpu") for x in elsewhere)]
        raise DeviceMismatch(f"{function}: expected all tensors to be on the same device, got {shapes}")


def _mixes(function: OpOverload, name: str, args: tuple[Any, ...], elsewhere: list[Tensor], written: list[Tensor]) -> bool:
    """Whether an operator takes these tensors of the CPU beside others of the device."""
    if name in _INDEXED:
        # Indices may come from anywhere into a tensor of the device; what they put there may be one number.
        values = args[2] if len(args) > 2 else None
        return not any(args[0] is x or (values is x and x.dim()) for x in elsewhere)
    numbers = not any(x.dim() for x in elsewhere) and not any(x is y for x in elsewhere for y in written)
    # The fused optimizers have kernels that read all from the device, and the package's own operators are kernels.
    pointwise = torch.Tag.pointwise in function.tags or name in _NUMBERS or name.startswith("aten._foreach")
    return numbers and pointwise and not name.startswith("aten._fused")
