"""One process per folder."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError

# What a lock says that somebody else holds; everything else is a file system without locks.
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


@contextmanager
def locked(output: Path, key: str = "output.dir") -> Iterator[None]:
    """One process per folder; the lock ends with the process, however it ends. key: of the recipe that names the folder.

    Raises UsageError when another process holds it, the folder cannot be written, or its .lock is somebody else's file.
    """
    file = output / ".lock"
    try:
        output.mkdir(parents=True, exist_ok=True)
        files.check_regular(file)
        if file.is_symlink():
            raise UsageError(f"{file} is a link; lbllm keeps its lock there: move it away")
        handle: IO[str] = file.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{key} {output} cannot be written: {error.strerror}; choose another folder") from None
    with handle:
        handle.seek(0)
        owner = handle.read(100).strip()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                raise UsageError(
                    f"{key} {output} cannot be locked: {error.strerror}; its file system has no locks as it is mounted (Lustre "
                    "has them with -o flock, NFS with its lock service): have that changed, or choose another folder"
                ) from None
            raise UsageError(
                f"{key} {output} is in use by process {owner or 'unknown'}; wait for it or choose another folder"
            ) from None
        if owner and not owner.isdecimal():
            raise UsageError(f"{file} is not lbllm's, which keeps its lock there; move it away, or choose another {key}")
        with files.naming(file):
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
        yield
