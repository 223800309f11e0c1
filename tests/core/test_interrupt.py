"""Signals wait for a moment at which a run may stop."""

import os
import signal

import pytest

from lbllm_cli.core import interrupt
from lbllm_cli.core.errors import Interrupted


def test_a_signal_that_is_ignored_stays_ignored():
    """As of a stage that a shell has put into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.graceful():
            os.kill(os.getpid(), signal.SIGINT)
            interrupt.check()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_a_good_moment(number):
    before = signal.getsignal(number)
    with interrupt.graceful():
        interrupt.check()
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) == before, "a second signal ends the process"
        with pytest.raises(Interrupted, match=f"stopped by {number.name}; run the same command again to resume"):
            interrupt.check()
    assert signal.getsignal(number) == before
    with interrupt.graceful():
        interrupt.check()
