"""What CUDA refuses, and what this project refuses beside it.

Of the first kind an operator raises at once, as torch with CUDA does. The second kind is written down, with the line of the
package that broke the rule, and whoever runs a program on the simulated device looks at the list when it has ended.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._ops import OpOverload

from simulated_gpu.accounting import site

# Uploads of more bytes than this have to come from pinned memory wherever hidden states pass or steps are taken.
PAGEABLE = 64 << 10
# A training step, and a pass of hidden states.
STEP, PASS = "training step", "pass of hidden states"

# CUDA takes tensors of the CPU beside its own here: copies, and indices into a tensor on the device.
_MIXED = {"aten.copy_", "aten._to_copy", "aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}
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


def synchronises(name: str, args: tuple[object, ...]) -> bool:
    """Whether an operator waits for the device to know the shape of its result."""
    if name in ("aten.index", "aten._unsafe_index"):
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in _indices(args[1]))
    if name in ("aten.index_put", "aten.index_put_", "aten._index_put_impl_"):
        # A number for all that a mask says needs no count of them.
        masks = [index for index in _indices(args[1]) if index.dtype in (torch.bool, torch.uint8)]
        accumulates = len(args) > 3 and bool(args[3])
        return bool(masks) and (accumulates or _elements(args[2]) > 1)
    return name in _SIZES or name == "aten.repeat_interleave" and len(args) == 1


def _indices(given: object) -> list[Tensor]:
    return [index for index in given if isinstance(index, Tensor)] if isinstance(given, list | tuple) else []


def _elements(value: object) -> int:
    return value.numel() if isinstance(value, Tensor) else 1


def check_devices(
    function: OpOverload, name: str, args: tuple[object, ...], here: list[Tensor], elsewhere: list[Tensor], written: list[Tensor]
) -> None:
    """Raises DeviceMismatch for tensors of the CPU where CUDA takes none. here: on the device. written: of all, what changes."""
    if not here or not elsewhere:
        return
    if name.startswith("aten._fused_adam") or name.startswith("lbllm."):
        _refuse(function, here, elsewhere)
    if name in ("aten.copy_", "aten._to_copy"):
        return
    if name in _MIXED:
        values = args[2] if len(args) > 2 else None
        if any(args[0] is x for x in elsewhere) or isinstance(values, Tensor) and any(values is x for x in elsewhere) and values.dim():
            _refuse(function, here, elsewhere)
        return
    scalars = torch.Tag.pointwise in function.tags or name in _NUMBERS or name.startswith("aten._foreach")
    if not scalars or any(x.dim() for x in elsewhere) or any(x is y for x in elsewhere for y in written):
        _refuse(function, here, elsewhere)


def _refuse(function: OpOverload, here: list[Tensor], elsewhere: list[Tensor]) -> None:
    shapes = [*((tuple(x.shape), "cuda:0") for x in here), *((tuple(x.shape), "cpu") for x in elsewhere)]
    raise DeviceMismatch(f"{function}: expected all tensors to be on the same device, got {shapes}")
