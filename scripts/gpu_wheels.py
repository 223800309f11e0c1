#!/usr/bin/env python3
"""What lbllm needs on a machine that has torch, Triton and numpy, as requirements of the versions that are installed here.

    python scripts/gpu_wheels.py

Of lbllm's own dependencies `datasets` and `lm-eval` are left out, with what they bring: no slice of scripts/bench/gpu.py reads
the hub or runs a task. The tests' runner is among them.
"""

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

THERE = ("torch", "triton", "numpy")
LEFT_OUT = ("datasets", "lm-eval", "pyarrow", *THERE)
TESTS = ("pytest", "pytest-xdist")


def direct(name: str) -> list[str]:
    """What a package depends on, without extras. Raises PackageNotFoundError for one that is not installed."""
    found = (Requirement(line) for line in distribution(name).requires or ())
    return [one.name for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def closure(names: Iterable[str]) -> dict[str, str]:
    """Versions of packages and of everything that they depend on, as far as it is installed."""
    found: dict[str, str] = {}
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            todo += direct(name)
            found[name] = distribution(name).version
        except PackageNotFoundError:
            continue
    return found


def wanted() -> dict[str, str]:
    """Versions of what has to be brought along, by name."""
    needed = closure([*(name for name in direct("lbllm-cli") if name not in LEFT_OUT), *TESTS])
    there = closure(THERE)
    return {name: version for name, version in sorted(needed.items()) if name not in there}


if __name__ == "__main__":
    for package, number in wanted().items():
        print(f"{package}=={number}")
