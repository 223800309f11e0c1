"""Killed anywhere, by SIGKILL or SIGTERM, once or twice: the same command ends with the bytes of an uninterrupted run.

A point is the n-th change of a file or a moment; moments are as random as the machine, and a failure names the point.
"""

import random
import signal
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
import session
from bases import LOCK, RECIPE, copied, model, stage_writes
from promise import Case, broken, snapshot
from runner import Kill, Server
from session import seeds
from shared import shared

# What tells how a run went, and how long it took.
_OF_THE_RUN = {"events.jsonl", "environment.json", "loss.png", ".lock"}
NORMAL, ALL = 2, 22
# Seconds after which the program has begun to listen to signals.
_LISTENS = 0.05


@dataclass(frozen=True)
class Step:
    """A command of a run. arguments: behind its name. writes: as a case's."""

    command: str
    writes: tuple[str, ...]
    arguments: tuple[str, ...] = ()

    @property
    def line(self) -> list[str]:
        """Its command line."""
        return [self.command, "--recipe", RECIPE, *self.arguments]


_EXPORT = tuple(f"work/run/export{tail}" for tail in ("", "/*", ".partial", ".partial/*", ".replaced", ".replaced/*"))
STEPS = {
    "ptq": Step("ptq", stage_writes("ptq")),
    "distill": Step("distill", stage_writes("distill"), ("--only", "blocks", "runtime.save_minutes=0")),
    "distill-e2e": Step("distill", stage_writes("distill-e2e"), ("--only", "end-to-end", "runtime.save_minutes=0")),
    "act-calib": Step("act-calib", stage_writes("act-calib"), ("--only", "blocks", "runtime.save_minutes=0")),
    "act-calib-e2e": Step("act-calib", stage_writes("act-calib-e2e"), ("--only", "end-to-end", "runtime.save_minutes=0")),
    "eval": Step("eval", (*LOCK, "work/run/eval", "work/run/eval/*")),
    "report": Step("report", (*LOCK, "work/run/report.*")),
    "export": Step("export", (*LOCK, *_EXPORT)),
}


@dataclass(frozen=True)
class Whole:
    """An uninterrupted step. before: the folder that it starts from. files: hashes of what it has left. operations, seconds: of
    it.
    """

    before: Path
    files: dict[str, str]
    operations: int
    seconds: float


def hashes(run: Path) -> dict[str, str]:
    """Every file that the promise of equal bytes covers."""
    kept = [path for path in run.rglob("*") if path.is_file() and path.name not in _OF_THE_RUN]
    return {str(path.relative_to(run)): sha256(path.read_bytes()).hexdigest() for path in kept}


@pytest.fixture
def server(tmp_path_factory) -> Server:
    return session.server(tmp_path_factory.getbasetemp())


def whole_run(server: Server, place: Path) -> dict[str, Whole]:
    """Every step of one run, and the folder before it."""
    before, found = model(place / "0"), {}
    for number, (name, step) in enumerate(STEPS.items(), 1):
        folder = place / str(number)
        copied(before, folder)
        result = server.run(step.line, folder)
        assert result.code == 0, result.stderr
        found[name] = Whole(before, hashes(folder / "work" / "run"), result.operations, result.seconds)
        before = folder
    return found


@pytest.fixture
def wholes(server, tmp_path_factory) -> dict[str, Whole]:
    return shared(tmp_path_factory.getbasetemp(), "kills", lambda place: whole_run(server, place))


def _point(whole: Whole, signum: int, rng: random.Random) -> Kill:
    if rng.random() < 0.6:
        return Kill(signum, operation=rng.randrange(whole.operations))
    return Kill(signum, seconds=rng.uniform(_LISTENS, max(_LISTENS, whole.seconds)))


@pytest.mark.parametrize("seed", seeds(NORMAL, ALL))
@pytest.mark.parametrize("name", STEPS)
def test_killed_and_run_again(name, seed, server, wholes, tmp_path):
    step, whole, rng = STEPS[name], wholes[name], random.Random(f"{name} {seed}")
    folder = tmp_path / "case"
    copied(whole.before, folder)
    before, case = snapshot(folder), Case(name, step.line, step.writes)
    points = []
    for _ in range(1 + (rng.random() < 0.3)):
        signum = (signal.SIGKILL, signal.SIGTERM)[(seed + len(points)) % 2]
        points.append(_point(whole, signum, rng))
        killed = server.run(step.line, folder, kill=points[-1])
        # The point may come after the end: a run that goes on needs less, and no two take the same time.
        allowed = (0, -signal.SIGKILL) if signum == signal.SIGKILL else (0, 130)
        assert killed.code in allowed, f"{points}: exit code {killed.code}\n{killed.stderr[-3000:]}"
        wrong = [text for text in broken(case, before, snapshot(folder), killed) if not text.startswith("exit code -9")]
        assert not wrong, f"{points}: {wrong}\n{killed.stderr[-3000:]}"
    result = server.run(step.line, folder)
    assert not broken(case, before, snapshot(folder), result), f"{points}\n{result.stderr[-3000:]}"
    assert result.code == 0, f"{points}\n{result.stderr[-3000:]}"
    found = hashes(folder / "work" / "run")
    different = sorted(key for key in found.keys() | whole.files.keys() if found.get(key) != whole.files.get(key))
    assert not different, f"{points}: {different}"
