"""What `lbllm eval` has measured, kept by what it was measured on: a checkpoint or text that is added costs only itself."""

from pathlib import Path
from typing import Any

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.fingerprint import fingerprint
from lbllm_cli.evaluation.records import is_measured

# Measurements of another version are made again.
_VERSION = 1


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
        path = self._path(what)
        if self.fresh and path not in self._own:
            return None
        try:
            record = files.read_json(path)
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
