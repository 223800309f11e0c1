"""How a command ends: one message on stderr, and an exit code."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from lbllm_cli.core.errors import LbllmError
from lbllm_cli.parallel.launch import started

# Ends of a run: what happens to disks and folders while it runs, a file that is deleted under it among them.
_MACHINES = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOENT
}  # fmt: skip
# Names and folders as somebody has made them.
_USERS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENOTEMPTY}
# What mends them, where there is more to say than that something has to.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "let this user read and write there, or name another place,"),
    errno.EROFS: "have that disk mounted for writing, or name another place,",
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY), "move away what is there"),
}

_LONGEST = 8000
# Of a recipe what may be another on every machine; whether output.dir is one folder is asked where it is opened.
_PLACES = ("model.path", "output.dir", ".teacher")


def tell(message: str) -> None:
    """A message on stderr, of a bounded length: it repeats what is in a file, which may be anything."""
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]}... ({len(message):,} characters)"
    # Half a surrogate pair has no bytes in any encoding.
    typer.echo(f"lbllm: {message.encode('utf-8', 'backslashreplace').decode()}", err=True)


@contextmanager
def exit_codes(resumes: bool = False) -> Iterator[None]:
    """Turns what went wrong into one message on stderr and the exit code; a traceback is left for bugs of lbllm.

    resumes: whether the command goes on with what it has begun when it is given again.
    """
    try:
        yield
    except LbllmError as error:
        if str(error):  # of several ranks one speaks
            tell(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        tell("interrupted; run the same command again to resume")
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno not in _MACHINES | _USERS:
            raise
        # Of a copy the system names both files.
        names = " -> ".join(str(name)[:300] for name in (error.filename, error.filename2) if name)
        place, remedy = f" ({names})" if names else "", _REMEDIES.get(error.errno, "mend it")
        tell(f"{error.strerror}{place}; {remedy} and run the same command again{' to resume' if resumes else ''}")
        raise typer.Exit(1 if error.errno in _MACHINES else 2) from None
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            from lbllm_cli.runtime.backend import measured_peak

            tell(
                f"out of device memory{measured_peak()}; lower runtime.batch_size, or set runtime.streams: ram or disk, and run "
                "the same command again to resume; micro_batch_size, ptq.sequential: true or ptq.asymmetric: 0 help too, but "
                "begin the stage again (--force)"
            )
            raise typer.Exit(1) from None
        raise


def run(work: Callable[..., None], recipe: Path, overrides: list[str] | None, /, **options: Any) -> None:
    """A command that one process does."""
    with exit_codes():
        from lbllm_cli.recipe.load import load_recipe

        loaded = load_recipe(recipe, overrides)
        work(loaded, **options)


def run_ranks(work: Callable[..., None], recipe: Path, overrides: list[str] | None, /, **options: Any) -> None:
    """A command that several processes may do together, and that goes on when it is given again."""
    if started():
        # What a lost connection means is said in one line; torch would say where in its own source it was noticed, in fifty.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with exit_codes(resumes=True):
            from lbllm_cli.core.fingerprint import flatten
            from lbllm_cli.parallel.join import check_alike, joined
            from lbllm_cli.recipe.load import load_recipe

            with joined() as group:
                loaded = load_recipe(recipe, overrides)
                said = {key: leaf for name, part in loaded.model_dump().items() for key, leaf in flatten(part, name).items()}
                # Before anything else: ranks that do different things would wait for each other.
                check_alike(group, {**options, **{key: leaf for key, leaf in said.items() if not key.endswith(_PLACES)}})
                work(loaded, group=group, **options)
    except typer.Exit as ended:
        if started():
            # Threads of libraries that talk to ranks which are gone would hold up an orderly end.
            sys.stdout.flush()
            os._exit(ended.exit_code)
        raise
