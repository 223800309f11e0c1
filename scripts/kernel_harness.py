"""What the sections of bench_kernels.py share: results, interleaved rounds, walks over cold weights."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor

import lbllm_cli.hf  # noqa: F401  registers the packed format
from lbllm_cli.core import files
from lbllm_cli.engine.abi import tier
from lbllm_cli.runtime.cpu.library import pointer
from lbllm_cli.training.knees import Shape

# Tables as calibration finds them, with 25 and 55 as the largest places.
TABLES = [Shape(5, 5, 2, 3, 3, 3), Shape(3, 3, 4, 5, 6, 5)]
WEIGHT_RMS = 0.02
CACHE_DEFAULT = 32 << 20
# Bytes of one call that measures the bandwidth.
CHUNK = 12 << 20
# A candidate's walk over its copies ends after this many seconds and goes on in the next round: slow ones would take hours.
PATIENCE = 0.25

Record = dict[str, Any]


class Results:
    """Records by section and case, in a file that is written after every case."""

    def __init__(self, path: Path | None, force: bool, machine: Record):
        self.path, self.force = path, force
        self.records: dict[str, Record] = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
        if self.records.setdefault("machine", machine) != machine:
            raise SystemExit(f"{path} is of another machine or other versions: {self.records['machine']}; choose another --out")

    def measure(self, section: str, case: str, work: Callable[[], Record]) -> None:
        """Runs `work` unless its record is there already."""
        records = self.records.setdefault(section, {})
        if case in records and not self.force:
            return
        print(f"{section} {case}", file=sys.stderr)
        records[case] = work()
        if self.path:
            files.write_json(self.path, self.records)


def machine_facts(lib: Any, cache: int) -> Record:
    """What figures depend on beside the code."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "cache_bytes": cache, "tier": tier(lib), **versions}


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core sees."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text(encoding="ascii").strip()[:-1]) << 10 for path in sizes), default=CACHE_DEFAULT)


def medians(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """What each candidate returns, median over rounds after one that warms up; who begins changes from round to round."""
    names = list(candidates)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = candidates[name]()
            if turn:
                taken[name].append(seconds)
    return {name: median(own) for name, own in taken.items()}


class Walk:
    """One call per copy of the weights; calling it returns the median seconds of a round's calls.

    kept: tensors of which the calls have the addresses alone.
    """

    def __init__(self, calls: list[Callable[[], Any]], lib: Any, in_tier: str, *kept: Tensor):
        self.calls, self.lib, self.tier, self.at, self.kept = calls, lib, in_tier.encode(), 0, kept

    def __call__(self) -> float:
        self.lib.lbllm_choose_tier(self.tier)
        taken: list[float] = []
        while len(taken) < len(self.calls) and sum(taken) < PATIENCE:
            call = self.calls[self.at]
            began = perf_counter()
            call()
            taken.append(perf_counter() - began)
            self.at = (self.at + 1) % len(self.calls)
        return median(taken)


class Bench:
    """What all sections share. buffer: more bytes than the cache holds, for the bandwidth."""

    def __init__(self, arguments: argparse.Namespace, lib: Any, cache: int):
        self.arguments, self.lib, self.cold = arguments, lib, 3 * cache
        self.best = tier(lib)
        self.tiers = [name for name in arguments.tiers if lib.lbllm_choose_tier(name.encode()) == 0]
        lib.lbllm_choose_tier(self.best.encode())
        self.buffer = torch.ones(self.copies(CHUNK), CHUNK, dtype=torch.uint8)

    def reading(self, threads: int) -> Walk:
        """Reads the buffer, CHUNK bytes in a call: one long call would be interrupted more often than a kernel's."""
        calls = [partial(self.lib.lbllm_read, pointer(part), CHUNK, threads) for part in self.buffer]
        return Walk(calls, self.lib, self.best)

    def copies(self, size: int) -> int:
        """Copies of `size` bytes that the cache cannot hold; never one alone."""
        return max(2, -(-self.cold // size))
