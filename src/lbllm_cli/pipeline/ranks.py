"""Several ranks in one output folder: whether they can do a stage together, and its lock."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.lock import locked
from lbllm_cli.core.splits import held_out_rows
from lbllm_cli.parallel.group import Group
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.recipe.stages import StageSpec
from lbllm_cli.recipe.training import Schedule

# A network file system shows a new file to other machines after so many seconds at most.
_SHOWN = 35.0


def check_shares(plan: Plan, spec: StageSpec, rows: int) -> None:
    """Whether every rank has a sequence to begin with, and one in each step; of ranks that run, or that are asked about.

    rows: sequences of the stage. Raises UsageError naming the key to change.
    """
    size, settings = plan.world.size, plan.settings(spec)
    key = f"{spec.text if settings.subset is None else spec.section}.sequences"
    if rows < size:
        raise UsageError(f"{spec}: {rows} sequences for {size} ranks; raise {key}, or start at most {rows}")
    if size == 1 or not isinstance(settings, Schedule):
        return
    if settings.batch_size < size:
        raise UsageError(
            f"{spec.section}.batch_size is {settings.batch_size}, and {size} ranks take part in every step; raise it to {size}, "
            f"or start at most {settings.batch_size}"
        )
    if (trained := rows - held_out_rows(rows, settings.held_out)) < size:
        raise UsageError(f"{spec}: {trained} sequences are trained on, by {size} ranks; raise {key}")


@contextmanager
def held(output: Path, group: Group) -> Iterator[None]:
    """The lock of an output folder, which the first rank holds for all. Raises UsageError as `locked`, and where a rank sees
    another folder than the first one does.
    """
    if not group.first:
        owner, place = group.told(lambda: ("", ""))
        seen = _sees(output / ".lock", owner)
        _check_shared(output, group, seen, place)
        yield
        group.meet()
        return
    with locked(output):
        _, place = group.told(lambda: (str(os.getpid()), platform.node()))
        _check_shared(output, group, True, place)
        yield
        group.meet()


def await_file(file: Path, group: Group) -> None:
    """Until a file that the first rank sees is shown to this one: a network file system remembers for a while that it was not
    there, as when the command began.
    """
    if not group.told(file.exists) or group.first:
        return
    until = time.monotonic() + _SHOWN
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.1)


def _check_shared(output: Path, group: Group, seen: bool, place: str) -> None:
    for rank, (other, its) in enumerate(group.facts((seen, platform.node()))):
        if not other:
            raise UsageError(
                f"output.dir {output} on {its} (rank {rank}) is not the folder that it is on {place} (rank 0); "
                "choose one on a disk that all machines share"
            )


def _sees(lock: Path, owner: str) -> bool:
    """Whether a lock is that of the first rank's process."""
    until = time.monotonic() + _SHOWN
    while True:
        try:
            if files.read_text(lock, 100) == owner:
                return True
        except (FileNotFoundError, UsageError):
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
