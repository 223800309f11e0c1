"""What every command promises, whatever it is given, and what a case is."""

import fnmatch
import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from runner import MEMORY, SECONDS, Result, Server

CODES = (0, 1, 2, 130)
# Bytes of stderr: a message that repeats ten megabytes of a user's file is none.
_MESSAGE = 20_000
_HASHED = 64 << 20
# Beside what a case says, these belong to whoever runs it.
_OWN = ("stdin", "stdout", "stderr")


@dataclass(frozen=True)
class Case:
    """A command line over the files of a folder.

    kind: name of the mutation. writes: patterns of paths, relative to the folder, that the command may make, change or delete.
    outcome: `refused` where it must not end with 0, `done` where it must. ends_as: patterns of files that hold, after an exit
    code of 0, what they held before the mutation.
    """

    kind: str
    arguments: list[str]
    writes: tuple[str, ...] = ()
    outcome: Literal["any", "refused", "done"] = "any"
    ends_as: tuple[str, ...] = ()
    stdin: str = ""
    env: dict[str, str] = field(default_factory=dict)


Snapshot = dict[str, tuple[object, ...]]


def prepare(folder: Path) -> Path:
    """The folders of a case, canaries among them: returns the one that commands run in."""
    for name in ("work", "home", "tmp", "beside"):
        (folder / name).mkdir(parents=True)
    for name in ("work/precious.txt", "home/precious.txt", "beside/precious.txt"):
        (folder / name).write_text("Not to be touched.\n", encoding="utf-8")
    return folder / "work"


def snapshot(folder: Path) -> Snapshot:
    """Everything below a folder: kinds, modes, sizes, times, links and hashes, by relative path."""
    found: Snapshot = {}
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            facts = path.lstat()
            key = os.path.relpath(path, folder)
            if key in _OWN:
                continue
            if stat.S_ISREG(facts.st_mode) and facts.st_size <= _HASHED:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                found[key] = (facts.st_mode, facts.st_size, facts.st_mtime_ns, content)
            elif stat.S_ISLNK(facts.st_mode):
                found[key] = (facts.st_mode, os.readlink(path))
            else:
                found[key] = (facts.st_mode,)
    return found


def _messages(stderr: str) -> int:
    """Messages of failure: ours, or the option parser's."""
    return sum(line.startswith(("lbllm: ", "Error: ", "╭─ Error")) for line in stderr.splitlines())


def broken(case: Case, before: Snapshot, after: Snapshot, result: Result, original: Snapshot | None = None) -> list[str]:
    """What of the promise the command has not kept. original: the folder before the mutation."""
    wrong = []
    if result.late:
        wrong.append(f"ran longer than {SECONDS} s")
    elif result.code not in CODES:
        wrong.append(f"exit code {result.code}")
    if "Traceback" in result.stderr:
        wrong.append("a traceback")
    elif result.code in (1, 2, 130) and _messages(result.stderr) != 1:
        wrong.append(f"{_messages(result.stderr)} messages of failure, expected one")
    if len(result.stderr) > _MESSAGE:
        wrong.append(f"{len(result.stderr):,} characters of messages")
    if result.memory > MEMORY:
        wrong.append(f"{result.memory / 2**30:.1f} GiB of memory")
    if case.outcome == "refused" and result.code == 0:
        wrong.append("exit code 0, expected a refusal")
    if case.outcome == "done" and result.code != 0:
        wrong.append(f"exit code {result.code}, expected 0")
    touched = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    for key in touched:
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in case.writes):
            wrong.append(f"touched {key}: {'deleted' if key not in after else 'made' if key not in before else 'changed'}")
    for key, facts in (original or {}).items():
        # Kind, size, time, hash: files are made at other times.
        same = facts[3:] == after.get(key, ())[3:]
        if result.code == 0 and not same and any(fnmatch.fnmatchcase(key, pattern) for pattern in case.ends_as):
            wrong.append(f"exit code 0, and {key} is not what it was before the mutation")
    return wrong


def check(server: Server, folder: Path, case: Case, original: Snapshot | None = None) -> tuple[list[str], Result]:
    """Runs a case in its prepared folder: what is broken, and what came out. original: the folder before the mutation."""
    before = snapshot(folder)
    result = server.run(case.arguments, folder, case.stdin, case.env)
    return broken(case, before, snapshot(folder), result, original), result
