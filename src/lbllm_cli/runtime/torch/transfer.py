"""Copies between RAM and a device that do not hold up whoever computes: pinned buffers, and streams of their own.

A buffer is used again once the copy out of it, or into it, is done; a copy from memory that is not pinned would wait for the
device and pass through a buffer of the driver's.
"""

import threading
from collections import defaultdict, deque
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Landing(NamedTuple):
    """A copy to RAM under way. values: pinned, not to be read before `wait`."""

    values: Tensor
    done: Any

    def wait(self) -> Tensor:
        """The values."""
        self.done.synchronize()
        return self.values


class Transfers:
    """Copies to and from one device. module: of torch, for the kind of device."""

    def __init__(self, module: Any, device: torch.device):
        self.module, self.device = module, device
        self.up, self.down = module.Stream(device), module.Stream(device)
        self._free: dict[int, deque[tuple[Tensor, Any]]] = defaultdict(deque)
        self._lock = threading.Lock()

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned memory, to be handed to `upload` or `release`.

        There are as many as were in use at once: whoever reads ahead or writes behind says how far.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        with self._lock:
            free = self._free[size]
            whole, done = free.popleft() if free else (None, None)
        if whole is None:
            whole = torch.empty(size, dtype=torch.uint8).pin_memory()
        if done is not None:
            done.synchronize()
        return whole.view(dtype).view(shape)

    def release(self, buffer: Tensor, done: Any = None) -> None:
        """Gives a buffer back. done: an event after which it may be written to."""
        whole = buffer.view(-1).view(torch.uint8)
        with self._lock:
            self._free[whole.numel()].append((whole, done))

    def upload(self, buffer: Tensor) -> Tensor:
        """What a buffer holds, on the device, for whoever computes there next. The buffer is given back."""
        main = self.module.current_stream(self.device)
        with self.module.stream(self.up):
            found = torch.empty_like(buffer, device=self.device)
            found.copy_(buffer, non_blocking=True)
            done = self.module.Event()
            done.record(self.up)
        main.wait_event(done)
        # Its memory belongs to the stream that it was made on; it is read on another.
        found.record_stream(main)
        self.release(buffer, done)
        return found

    def later(self, tensor: Tensor) -> Landing:
        """Begins a copy of a few values to RAM, into memory of its own."""
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
        buffer.copy_(tensor, non_blocking=True)
        done = self.module.Event()
        done.record(self.module.current_stream(self.device))
        return Landing(buffer, done)

    def small(self, tensor: Tensor) -> Tensor:
        """A small tensor of RAM on the device."""
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def download(self, tensor: Tensor) -> Landing:
        """Begins a copy to RAM, into a buffer that whoever waits for it gives back."""
        tensor = tensor.contiguous()
        buffer = self.buffer(tuple(tensor.shape), tensor.dtype)
        self.down.wait_stream(self.module.current_stream(self.device))
        with self.module.stream(self.down):
            buffer.copy_(tensor, non_blocking=True)
            done = self.module.Event()
            done.record(self.down)
        tensor.record_stream(self.down)
        return Landing(buffer, done)
