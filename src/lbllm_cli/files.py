"""Writing without loss: temporary file, fsync, rename."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Puts a file's bytes on disk for good."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary file beside `path`, which then replaces `path` as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Text file, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def write_json(path: Path, value: Any) -> None:
    """JSON file, atomically; keys keep their order."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def touch(path: Path) -> None:
    """Makes a target newer than what it depends on: Make would run a command that finds it up to date again every time."""
    os.utime(path)


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
