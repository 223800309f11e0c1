"""How a command ends: one message on stderr, and an exit code."""

import errno
import os
import re
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
def exit_codes() -> Iterator[None]:
    """Turns what went wrong into one message on stderr and the exit code; a traceback is left for bugs of lbllm."""
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
        place = f" ({str(error.filename)[:300]})" if error.filename else ""
        tell(f"{error.strerror}{place}; mend it and run the same command again to resume")
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
        # safetensors says what the system said in an error of its own: "I/O error: ... (os error 28)".
        said = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if said is not None and int(said[1]) in _MACHINES:
            tell(f"{os.strerror(int(said[1]))}; mend it and run the same command again to resume")
            raise typer.Exit(1) from None
        raise


def run(work: Callable[..., None], recipe: Path, overrides: list[str] | None, /, **options: Any) -> None:
    """A command that one process does."""
    with exit_codes():
        from lbllm_cli.recipe.load import load_recipe

        loaded = load_recipe(recipe, overrides)
        work(loaded, **options)


def run_ranks(work: Callable[..., None], recipe: Path, overrides: list[str] | None, /, **options: Any) -> None:
    """A command that several processes may do together."""
    if started():
        # What a lost connection means is said in one line; torch would say where in its own source it was noticed, in fifty.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with exit_codes():
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
