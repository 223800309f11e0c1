"""SIGINT and SIGTERM end a command at once while it has nothing to lose, and a stage between two steps."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from lbllm_cli.core.errors import Interrupted

_received: list[int] = []


def end_at_once() -> None:
    """From now on SIGINT and SIGTERM end the process with a line and exit code 130, wherever it is; see `graceful` for the rest.

    Not by an exception: one that is raised in an import, a destructor or a callback of a library is swallowed there, or leaves a
    traceback. What is on disk is whole at every moment, as it has to be for a kill.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        # A progress bar hides the cursor of a terminal.
        shown = b"\x1b[?25h" if os.isatty(2) else b""
        with suppress(OSError):
            os.write(2, shown + b"lbllm: interrupted; run the same command again to resume\n")
        os._exit(130)

    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # a job in the background ignores the terminal's
            signal.signal(signum, end)


def ignore() -> None:
    """After a command: what is done is done. Python takes its handlers back some time before it ends, which it takes a second
    for with torch in it, and a signal there would be a death by that signal.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def graceful() -> Iterator[None]:
    """Until the end of the block, the first SIGINT or SIGTERM only makes `check` raise; a second one ends the process."""

    def note(signum: int, frame: FrameType | None) -> None:
        _received.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    _received.clear()
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    before = {signum: handler for signum, handler in handlers.items() if handler is not signal.SIG_IGN}  # as in `end_at_once`
    for signum in before:
        signal.signal(signum, note)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def check() -> None:
    """Raises Interrupted when a signal has arrived. Called wherever stopping loses nothing but time."""
    if _received:
        raise Interrupted(f"stopped by {signal.Signals(_received[0]).name}; run the same command again to resume")
