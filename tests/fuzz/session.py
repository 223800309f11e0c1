"""Which cases run, and the server of this process."""

import atexit
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from runner import Server

_servers: list[Server] = []


def seeds(normal: int, every: int) -> list[Any]:
    """Seeds of the cases to run: the first `normal` of them always, all with `-m "slow or not slow"`.

    LBLLM_FUZZ_SEED and LBLLM_FUZZ_CASES choose others: the first seed, and how many.
    """
    first, count = os.environ.get("LBLLM_FUZZ_SEED"), os.environ.get("LBLLM_FUZZ_CASES")
    if first or count:
        start = int(first or 0)
        return list(range(start, start + int(count or normal)))
    return [pytest.param(seed, marks=[] if seed < normal else pytest.mark.slow) for seed in range(every)]


def server(root: Path) -> Server:
    """The server of this process, started when it is first asked for. root: the base of its temporary folders."""
    if sys.platform != "linux":
        pytest.skip("the server waits for its children as Linux does")
    if not _servers:
        _servers.append(Server(root / "server"))
        atexit.register(_servers[0].close)
    return _servers[0]
