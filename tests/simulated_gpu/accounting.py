"""What was done on the simulated device: per phase and line of the package, and how many bytes were alive."""

import sys
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PACKAGE = "/lbllm_cli/"
# What torch's allocator hands out is a multiple of this.
_BLOCK = 512
# Seconds that a kernel takes whatever it does.
LAUNCH = 2.5e-6


@dataclass(frozen=True)
class Rates:
    """Of a device, a second. bytes: of its memory. flops: by kind, "bf16", "fp32" or "int8"."""

    bytes: float
    flops: dict[str, float]


@dataclass
class Row:
    """Counts; weights make them fractions where a loop is sampled. seconds: of the device, arithmetic. syncs: by kind.

    uploads, downloads: bytes. flops: by kind.
    """

    calls: float = 0.0
    kernels: float = 0.0
    read: float = 0.0
    written: float = 0.0
    uploads: float = 0.0
    downloads: float = 0.0
    seconds: float = 0.0
    flops: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Row") -> None:
        """Sums up."""
        for name in ("calls", "kernels", "read", "written", "uploads", "downloads", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("flops", "syncs", "operators"):
            getattr(self, name).update(getattr(other, name))


def site() -> str:
    """Where in the package the caller is: "ptq/em.py:58"; the module of transformers, where that was not called from here."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if PACKAGE in file:
            return f"{file.rpartition(PACKAGE)[2]}:{frame.f_lineno}"
        if "/transformers/models/" in file:
            return "transformers " + frame.f_code.co_qualname.partition(".")[0]
        frame = frame.f_back
    return "elsewhere" if threading.current_thread() is threading.main_thread() else "autograd"


class Accounts:
    """Rows by phase and line. rates: of the device that seconds are worked out for. weight: how many calls one stands for."""

    rates: Rates

    def __init__(self) -> None:
        self.phase = "-"
        self.weight = 1.0
        self.rows: dict[tuple[str, str], Row] = defaultdict(Row)

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Counts under the name of a phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @property
    def row(self) -> Row:
        """Of the present phase and line."""
        return self.rows[self.phase, site()]

    def launched(self, operator: str, kernels: int, read: float, written: float, work: dict[str, float]) -> None:
        """One call of an operator. read, written: bytes. work: FLOP by kind."""
        row, weight = self.row, self.weight
        row.calls += weight
        row.operators[operator] += weight
        row.kernels += weight * kernels
        row.read += weight * read
        row.written += weight * written
        computing = sum(flop / self.rates.flops[kind] for kind, flop in work.items())
        row.seconds += weight * (kernels * LAUNCH + max((read + written) / self.rates.bytes, computing))
        for kind, flop in work.items():
            row.flops[kind] += weight * flop

    def synchronised(self, kind: str) -> None:
        """Whoever computes waited for the device."""
        self.row.syncs[kind] += self.weight

    def copied(self, uploads: float = 0.0, downloads: float = 0.0) -> None:
        """Bytes between RAM and the device."""
        row = self.row
        row.uploads += self.weight * uploads
        row.downloads += self.weight * downloads

    def phases(self) -> dict[str, Row]:
        """Sums of the phases, in the order in which they came."""
        found: dict[str, Row] = defaultdict(Row)
        for (phase, _), row in self.rows.items():
            found[phase].add(row)
        return dict(found)


class Memory:
    """Bytes of the device's storages that are alive, and those that torch has had at once and keeps, `reserved`.

    freed: told of each that goes, by its key.
    """

    def __init__(self, freed: Callable[[int], None]):
        self.live = self.peak = self.reserved = 0
        self.peaks: dict[str, int] = {}
        self.freed = freed
        self._known: set[int] = set()

    def track(self, inner: Tensor, phase: str) -> int:
        """Key of a tensor's storage; a new one is alive from here on."""
        storage = inner.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = -(-storage.nbytes() // _BLOCK) * _BLOCK
            self._known.add(key)
            self.live += size
            weakref.finalize(storage, self._gone, key, size).atexit = False
            self.peak, self.reserved = max(self.peak, self.live), max(self.reserved, self.live)
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.live)
        return key

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
        self.freed(key)


def touched(inner: Tensor) -> int:
    """Bytes that a kernel reads of a tensor: what is repeated along an axis is read once."""
    size = inner.numel() * inner.element_size()
    for extent, stride in zip(inner.shape, inner.stride(), strict=True):
        if stride == 0 and extent > 1:
            size //= extent
    return size


def kind_of(dtype: torch.dtype) -> str:
    """Kind of the arithmetic of a dtype."""
    return "bf16" if dtype in (torch.bfloat16, torch.float16) else "int8" if dtype == torch.int8 else "fp32"
