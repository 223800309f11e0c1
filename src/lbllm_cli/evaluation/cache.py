"""What `lbllm eval` has measured, kept by what it was measured on: a checkpoint or text that is added costs only itself.

Beside it is kept what the names in results.json stood for. So a run can show what earlier ones measured, of texts and tasks that
it was not asked for too, and one name never stands for two texts.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.fingerprint import fingerprint
from lbllm_cli.evaluation.records import Named, is_measured
from lbllm_cli.evaluation.tasks import GROUPS

# Measurements of another version are made again.
_VERSION = 1
_NAMES = "names.json"


class Measurements:
    """A folder of JSON files named by the hash of what was measured; `fresh` finds nothing in it, and replaces."""

    def __init__(self, folder: Path, fresh: bool = False):
        self.folder = folder
        self.fresh = fresh
        self._own: set[Path] = set()

    def _path(self, what: dict[str, Any]) -> Path:
        return self.folder / f"{fingerprint({'version': _VERSION, **what})[:32]}.json"

    def get(self, what: dict[str, Any]) -> dict[str, Any] | None:
        """What was found for `what`, or None. A file that is damaged counts as none."""
        return None if self.fresh and self._path(what) not in self._own else self.kept(what)

    def kept(self, what: dict[str, Any]) -> dict[str, Any] | None:
        """As `get`, by earlier runs as well where `fresh` measures again."""
        try:
            record = files.read_json(self._path(what))
        except (UsageError, FileNotFoundError):
            return None
        found = record.get("found") if isinstance(record, dict) else None
        return found if is_measured(found, task="task" in what) else None

    def put(self, what: dict[str, Any], found: dict[str, Any]) -> None:
        """Keeps `found` for `what`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(what)
        files.write_json(path, {"what": what, "found": found})
        self._own.add(path)

    def forget(self, what: dict[str, Any]) -> None:
        """Deletes what was found for `what`: it is so no more."""
        self._path(what).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Deletes what a kill has left half written: the run that goes on may have known the value, and not write it again."""
        for path in self.folder.glob("*.json.tmp"):
            path.unlink(missing_ok=True)

    def name(self, now: Named) -> Named:
        """Keeps what names stand for now. Gives them, and those of earlier runs that stand for nothing else now."""
        found = _merged(self._names(), now)
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self.folder / _NAMES, found.model_dump())
        return found

    def _names(self) -> Named:
        try:
            return Named.model_validate(files.read_json(self.folder / _NAMES))
        except (UsageError, FileNotFoundError, ValidationError):
            return Named()


def _merged(before: Named, now: Named) -> Named:
    # A text that was given another name is not shown twice.
    texts = {name: text for name, text in before.texts.items() if name not in now.texts and text not in now.texts.values()}
    lines = {line for task in now.tasks.values() for line in task.lines}
    others = {name: task for name, task in before.tasks.items() if name not in now.tasks and not lines & set(task.lines)}
    tasks = {**now.tasks, **others}

    def alike(group: str) -> bool:
        members = [tasks.get(name) for name in GROUPS.get(group, ((), 0))[0]]
        return None not in members and all(one.setting == members[0].setting for one in members if one and members[0])

    groups = [group for group in before.groups if group not in now.groups and alike(group)]
    return Named(texts={**now.texts, **texts}, tasks=tasks, groups=[*now.groups, *groups])
