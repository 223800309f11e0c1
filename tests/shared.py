"""What the processes of a test run make once and share."""

import fcntl
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Made = TypeVar("Made")


def shared(root: Path, name: str, make: Callable[[Path], Made]) -> Made:
    """`make(folder)`, once for all processes of a test run. root: the base of this one's temporary folders."""
    place = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, kept = place / name, place / f"{name}.made"
    with (place / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            kept.write_bytes(pickle.dumps(make(folder)))
        made: Made = pickle.loads(kept.read_bytes())
    return made
