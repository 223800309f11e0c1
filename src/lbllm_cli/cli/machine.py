"""A machine that a recipe is drafted for, and a model as it would be computed there: shapes and sizes, nothing is allocated."""

import math
import os
import shutil
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from lbllm_cli.core.console import GIB
from lbllm_cli.core.ram import available_ram
from lbllm_cli.models.model import SourceModel, open_model
from lbllm_cli.recipe.schema import Model
from lbllm_cli.runtime.backend import Backend, backend_of, choose_device
from lbllm_cli.runtime.stage_kernels import StageKernels
from lbllm_cli.runtime.torch.backend import TorchBackend

# Where a CPU has one of them, as lscpu calls them, a step of `distill` takes two thirds of the time: docs/measurements.md.
BFLOAT16 = {"avx512_bf16", "amx_bf16"}
# What the system knows of its processors; whatever has no such file is taken to have none of the instructions.
_PROCESSORS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """What is free on a machine, in bytes. kind: of the device that computes. name: of that device. On a CPU memory is RAM.

    bfloat16: whether the CPU has the instructions that `BFLOAT16` names.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    memory: int
    ram: int
    disk: int
    cores: int
    bfloat16: bool = False

    @classmethod
    def here(cls) -> "Machine":
        """This one, as it is now; its disk is that of the current folder."""
        device = choose_device("auto")
        backend = backend_of(device)
        return cls(
            kind="cpu" if backend.shares_ram else "cuda",
            name=backend.describe(device),
            memory=backend.free_memory(device),
            ram=available_ram(),
            disk=shutil.disk_usage(Path.cwd()).free,
            cores=os.cpu_count() or 1,
            bfloat16=_multiplies_bfloat16(),
        )

    @property
    def has_gpu(self) -> bool:
        """Whether its device has memory of its own."""
        return self.kind == "cuda"

    @cached_property
    def backend(self) -> Backend:
        """What forecasts ask of its device."""
        return _ForecastBackend(self)

    @property
    def dtype(self) -> Literal["bfloat16", "float32"]:
        """What it trains in fastest, of what training works in."""
        return "bfloat16" if self.has_gpu or self.bfloat16 else "float32"

    def __str__(self) -> str:
        gpu = f"a GPU ({self.name}) with {self.memory / GIB:.0f} GiB free, " if self.has_gpu else "no GPU, "
        return f"{gpu}{self.ram / GIB:.0f} GiB of RAM, {self.disk / GIB:.0f} GiB of disk, {self.cores} cores"


def _multiplies_bfloat16() -> bool:
    try:
        return not BFLOAT16.isdisjoint(_PROCESSORS.read_text(encoding="utf-8").split())
    except OSError:
        return False


class _ForecastBackend(TorchBackend):
    """A machine's device. What does not depend on the single device is as its kind's backend has it."""

    def __init__(self, machine: Machine):
        super().__init__(machine.kind)
        self._machine, self._usual = machine, backend_of(torch.device(machine.kind))
        self.shares_ram = self._usual.shares_ram

    @property
    def kernels(self) -> StageKernels | None:
        """Those of its kind."""
        return self._usual.kernels

    def count(self) -> int:
        """One: a recipe is for one device."""
        return 1

    def describe(self, device: torch.device) -> str:
        """The machine's own name of it."""
        return self._machine.name

    def free_memory(self, device: torch.device) -> int:
        """As the machine says."""
        return self._machine.memory if self._machine.has_gpu else self._machine.ram


@dataclass(frozen=True)
class PlacedModel(SourceModel):
    """A model on a machine, which need not be this one."""

    machine: Machine

    @property
    def backend(self) -> Backend:
        """The machine's."""
        return self.machine.backend

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    def count(self, names: list[str]) -> int:
        """As inherited; forecasts are made often, and a mixture of experts has 20,000 tensors."""
        return sum(map(self._sizes.__getitem__, names))

    @classmethod
    def open(cls, path: str, machine: Machine) -> "PlacedModel":
        """A folder or a Hugging Face id, of which no weight is fetched. Raises UsageError as `open_model`."""
        settings = Model(path=path, dtype=machine.dtype)
        found = open_model(settings, torch.device(machine.kind), weights=False)
        return cls(**{field.name: getattr(found, field.name) for field in fields(found)}, machine=machine)
