"""Folders that lbllm makes and later replaces or deletes: what they may hold, and that they are deleted only when they hold no
more.

A folder is recognised by its name, by the names of everything in it, and by a file that only lbllm writes. Whatever else is
there is the user's: nothing is deleted or renamed then, the folder is refused with the name of what does not belong in it.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lbllm_cli.core.errors import UsageError

# What a network file system makes of a file that is deleted while it is open.
_LEFT_OPEN = re.compile(r"\.nfs[0-9a-f]+")
# What safetensors fills before it has the name that it was given, and what a kill leaves of that.
_LEFT_UNWRITTEN = re.compile(r"\.tmp[A-Za-z0-9]{6}")


@dataclass(frozen=True)
class Kind:
    """One kind of folder.

    name: for messages. files: pattern of the names of its files, each of which may also end in .tmp while it is written.
    telling: pattern of those of them of which one at least tells that lbllm made the folder; None: their names do. folders: its
    folders by a pattern of their names.
    """

    name: str
    files: str
    telling: str | None = None
    folders: Mapping[str, "Kind"] = field(default_factory=dict)

    def holds(self, entry: str) -> bool:
        """Whether a file of this name belongs into the folder."""
        return bool(re.fullmatch(self.files, entry.removesuffix(".tmp")))

    def inner(self, entry: str) -> "Kind | None":
        """What a folder of this name in the folder is."""
        return next((kind for pattern, kind in self.folders.items() if re.fullmatch(pattern, entry)), None)

    def tells(self, entry: str) -> bool:
        """Whether a file of this name is one that only lbllm writes."""
        return self.telling is not None and bool(re.fullmatch(self.telling, entry))


def _left(entry: Path) -> bool:
    return bool(_LEFT_OPEN.fullmatch(entry.name) or _LEFT_UNWRITTEN.fullmatch(entry.name))


def remove_unwritten(folder: Path) -> None:
    """Deletes what a kill has left of files that were being written into a folder of lbllm's, where nobody writes now."""
    for entry in folder.iterdir():
        if _LEFT_UNWRITTEN.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
            entry.unlink(missing_ok=True)


def foreign(folder: Path, kind: Kind) -> str | None:
    """What speaks against `folder` being one of lbllm's, in words; None where nothing does, or there is no such folder."""
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink():
        return "is a link"
    if not folder.is_dir():
        return "is a file"
    entries = sorted(entry for entry in folder.iterdir() if not _left(entry))
    for entry in entries:
        if not entry.is_symlink() and entry.is_dir():
            inner = kind.inner(entry.name)
            if inner is None:
                return f"holds the folder {entry.name}"
            if reason := foreign(entry, inner):
                return f"holds {entry.name}/, which {reason}"
        elif not kind.holds(entry.name):
            return f"holds {entry.name}"
    # An empty one, or one in which the first file was being written, is nobody's loss.
    names = [entry.name.removesuffix(".tmp") for entry in entries if entry.name != ".lock"]
    if kind.telling and names and not any(map(kind.tells, names)):
        return f"holds {names[0]} and nothing that only lbllm writes"
    return None


def check_own(folder: Path, kind: Kind) -> None:
    """Raises UsageError where `folder` is there and holds, or is, anything else than what lbllm writes into it."""
    if reason := foreign(folder, kind):
        raise UsageError(
            f"{folder} {reason}: lbllm puts {kind.name} there, and deletes nothing that it did not write; "
            "move it away, or choose another output.dir"
        )


def remove_own(folder: Path, kind: Kind) -> None:
    """Deletes a folder of lbllm's, the file that it is recognised by last. Raises UsageError as `check_own`.

    What cannot be deleted stays.
    """
    check_own(folder, kind)
    if not folder.exists():
        return
    for entry in sorted(folder.iterdir(), key=lambda entry: kind.tells(entry.name)):
        inner = kind.inner(entry.name)
        if not entry.is_symlink() and entry.is_dir() and inner is not None:
            remove_own(entry, inner)
        else:
            with suppress(OSError):
                os.unlink(entry)
    with suppress(OSError):
        os.rmdir(folder)


def check_folders(output: Path, folders: list[str], files: list[str]) -> None:
    """Raises UsageError where one of some names in `output` is there and of the other kind: a file for a folder, or a folder."""
    for name in folders:
        if os.path.lexists(output / name) and not (output / name).is_dir():
            raise UsageError(f"{output / name} is no folder, and lbllm needs one of this name; move it away")
    for name in files:
        if os.path.lexists(output / name) and not (output / name).is_file():
            raise UsageError(f"{output / name} is no file, and lbllm writes one of this name; move it away")
