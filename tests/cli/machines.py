"""Machines that tests pretend to run on."""

from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from lbllm_cli.cli import machine as machines
from lbllm_cli.cli.machine import BFLOAT16, Machine
from lbllm_cli.core import ram
from lbllm_cli.runtime import backend

GIB = 1 << 30
# As free as such machines are with an operating system on them.
MACHINES = {
    "gpu-24": Machine("cuda", "RTX 4090", int(23.5 * GIB), 60 * GIB, 500 * GIB, 16),
    "gpu-80": Machine("cuda", "H100", 79 * GIB, 220 * GIB, 2000 * GIB, 32),
    "laptop": Machine("cpu", "cpu", 14 * GIB, 14 * GIB, 250 * GIB, 8),
}


class _Processors:
    """What `/proc/cpuinfo` says of a machine's."""

    def __init__(self, machine: Machine):
        self.flags = ["fma", "avx2", *sorted(BFLOAT16)[: machine.bfloat16]]

    def read_text(self, encoding: str) -> str:
        return f"model name\t: a CPU\nflags\t\t: {' '.join(self.flags)}\n\n"


def pretend(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """Lets this process see a machine's device, memory and disk, and nothing of its own."""
    usage = namedtuple("usage", "total used free")
    memory = namedtuple("memory", "total available")
    usual = backend._made

    def made(kind: str) -> backend.Backend:
        return machine.backend if kind == machine.kind else usual(kind)

    machine.backend  # noqa: B018 - made of the backends that are there
    patch.setattr(backend, "_made", made)
    patch.setattr(psutil, "virtual_memory", lambda: memory(machine.ram, machine.ram))
    patch.setattr(ram, "_SELF", Path("/nowhere"))  # no limit of the job that the tests are
    patch.setattr(machines, "_PROCESSORS", _Processors(machine))
    patch.setattr("shutil.disk_usage", lambda _: usage(machine.disk, 0, machine.disk))
