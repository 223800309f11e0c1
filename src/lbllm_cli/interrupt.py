"""SIGINT and SIGTERM end a stage between two steps instead of in the middle of one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lbllm_cli.errors import Interrupted

_received: list[int] = []


@contextmanager
def graceful() -> Iterator[None]:
    """Until the end of the block, the first SIGINT or SIGTERM only makes `check` raise; a second one ends the process."""

    def note(signum: int, frame: FrameType | None) -> None:
        _received.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    _received.clear()
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
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
