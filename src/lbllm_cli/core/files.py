"""Writing without loss: temporary file, fsync, rename. Reading what a user has put there: regular files, of bounded size."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lbllm_cli.core.errors import UsageError

# A recipe, a config.json or a manifest of this many bytes is none: tokenizer.json, the largest, has 10 to 40 MB.
TEXT_LIMIT = 256 << 20


def user_path(text: str, key: str) -> Path:
    """A path as a user writes it, `~` replaced. key: of the recipe or option that it stands under, for messages.

    Raises UsageError for what no system can open: an unknown user behind `~`, a NUL, a name that is too long.
    """
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except RuntimeError:
        raise UsageError(f"{key} {text}: there is no such user; write the path out") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # Whether it has to be there is for the caller to say.
    except (OSError, ValueError) as error:
        shown = text if len(text) < 200 else f"{text[:80]}... ({len(text)} characters)"
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{key} {shown!r} is not a path: {reason}; give another") from None
    return path


def check_regular(path: Path) -> None:
    """Raises UsageError where `path` is there and no file that can be read to its end: a folder, a pipe, a device."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise UsageError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}; expected a file")


def unwritable(folder: Path) -> str | None:
    """What keeps this user from making a folder, or a file in it, and what mends that; None where nothing does."""
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), Path())
    if not os.path.isdir(there):
        return f"{there} is no folder; move it away"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} is not a writable folder; let this user write there"
    return None


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """A text file of the user's, UTF-8. Raises FileNotFoundError, and UsageError for what is no text of at most `limit` bytes."""
    check_regular(path)
    try:
        if path.stat().st_size > limit:
            raise UsageError(f"{path} has {path.stat().st_size:,} bytes; at most {limit:,} are read")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def check_unicode(text: str, what: str) -> None:
    """Raises UsageError for half a surrogate pair, as JSON's "\\ud800": no file and no tokenizer takes it. what: for messages."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is no Unicode text: character {error.start} is half a pair ({text[error.start]!a})") from None


def read_json(path: Path) -> Any:
    """A JSON file. Raises as `read_text`, and UsageError where it is not JSON or nested too deeply to be read."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    except RecursionError:
        raise UsageError(f"{path} cannot be read as JSON: it is nested too deeply") from None


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Puts a file's bytes on disk for good."""
    with naming(path), path.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """While `path` is written: an error of the system that names no file, as that of a full disk does not, names it.

    Raises OSError also where safetensors has an error of its own for what the system said.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        # "Error while serializing: I/O error: ... (os error 28)"
        said = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if said is None:
            raise
        raise OSError(int(said[1]), os.strerror(int(said[1])), str(path)) from None


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary file beside `path`, which then replaces `path` as a whole or not at all.

    Raises OSError, which names a file.
    """
    temporary = path.with_name(path.name + ".tmp")
    # What a kill has left has the mode that it was given then.
    temporary.unlink(missing_ok=True)
    with naming(path):
        try:
            # As the umask has it, which cannot be read without being set for all threads. safetensors puts a file of mode 0600
            # in its place.
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            write(temporary)
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
            sync_file(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
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
    """Hash of a file's bytes. Raises UsageError for a pipe or a folder, which has none."""
    check_regular(path)
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
