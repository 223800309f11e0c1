"""What several processes have left, made once."""

from pathlib import Path
from typing import Any

import pytest
from parallel.of_ranks import leave, left_by
from parallel.processes import done, variables

# Processes, and how many of them are said to share a machine.
LAYOUTS = [(2, 2), (4, 4), (4, 2)]


@pytest.fixture(scope="session", params=LAYOUTS, ids=lambda layout: f"{layout[0]} ranks, {layout[1]} on a machine")
def layout(request) -> tuple[int, int]:
    """How many ranks there are, and how many on a machine."""
    return request.param


@pytest.fixture(scope="session")
def left(once, layout) -> list[dict[str, Any]]:
    """What each rank has found; see `of_ranks.leave`."""
    size, local = layout

    def make(folder: Path) -> list[dict[str, Any]]:
        folder.mkdir()
        done(variables(size, local), leave, folder)
        return left_by(folder, size)

    return once(f"ranks-{size}-{local}", make)
