#!/usr/bin/env python3
"""How fast hidden states move between a disk or RAM and the buffers that a GPU copies from.

    python scripts/bench/stream_copies.py --folder runs
    python scripts/bench/stream_copies.py --folder /mnt/nvme --rows 512 --write copies.json

Rows of a 7B (2,048 x 4,096 in bfloat16, 16.8 MB each) are written as a stage writes them, read in order as a pass reads them, and
read in pairs by chance as training reads them, into buffers that are used again and again. Rates are GB/s; a file that was just
written is read out of the system's cache unless --cold is given, which asks the system to drop it first.
"""

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lbllm_cli.core import files
from lbllm_cli.pipeline.streams import HiddenStream, row_slices

LENGTH, HIDDEN, BATCH = 2048, 4096, 4


def _rate(size: float, seconds: float) -> float:
    return round(size / seconds / 1e9, 2)


def _drop(path: Path) -> None:
    """Asks the system to forget what it has cached of a file."""
    with path.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(stream: HiddenStream, cold: bool) -> dict[str, float]:
    """GB/s of a stream: written (and put on disk for good), read in order, read by row number."""
    size = float(stream.rows * LENGTH * HIDDEN * stream.dtype.itemsize)
    values = torch.randn(BATCH, LENGTH, HIDDEN).bfloat16()
    pieces = row_slices(stream.rows, BATCH)
    # The first copy into new memory is dominated by the system's handing it out.
    buffer = values.clone()
    began = time.perf_counter()
    for rows in pieces:
        stream.write(rows, values[: rows.stop - rows.start])
    written = time.perf_counter() - began
    stream.sync()
    durable = time.perf_counter() - began
    found = {"write": _rate(size, written), "write and sync": _rate(size, durable)}
    order = torch.randperm(stream.rows, generator=torch.Generator().manual_seed(0)).split(2)
    for name, each in (("read in order", pieces), ("read in pairs", order)):
        if cold and stream.path is not None:
            _drop(stream.path)
        began = time.perf_counter()
        for rows in each:
            count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
            stream.read(rows, buffer[:count])
        found[name] = _rate(size, time.perf_counter() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to measure")
    parser.add_argument("--rows", type=int, default=64, help="sequences, 16.8 MB each")
    parser.add_argument("--cold", action="store_true", help="have the system drop the file from its cache before it is read")
    parser.add_argument("--write", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    shape = (arguments.rows, LENGTH, HIDDEN)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=arguments.folder) as folder:
        results = {
            "RAM": measure(HiddenStream(shape, torch.bfloat16), False),
            "disk": measure(HiddenStream(shape, torch.bfloat16, Path(folder) / "stream.bin"), arguments.cold),
        }
    for place, rates in results.items():
        print(f"{place:5}", ", ".join(f"{name} {rate} GB/s" for name, rate in rates.items()))
    if arguments.write:
        files.write_json(arguments.write, {"rows": arguments.rows, "cold": arguments.cold, **results})


if __name__ == "__main__":
    main()
