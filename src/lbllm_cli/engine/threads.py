"""How many threads a process may use to advantage."""

import os
from pathlib import Path


def usual_threads() -> int:
    """OMP_NUM_THREADS where it is set; else the cores that this process may run on, hyperthreads of a core counted once, and no
    more than its control group may use at a time.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdecimal() and int(asked):
        return int(asked)
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = {_siblings(number) for number in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _quota()))


def _siblings(number: int) -> str:
    """The hyperthreads of a processor's core, as Linux lists them; a name of its own where it does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(number)


def _quota() -> int:
    """Whole processors that a container's limit amounts to."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return os.cpu_count() or 1
