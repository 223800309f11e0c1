"""Several ranks in one output folder, as one of them sees it."""

import threading
import time
from types import SimpleNamespace

from lbllm_cli.pipeline import ranks
from lbllm_cli.pipeline.ranks import await_file


def other(there: bool) -> SimpleNamespace:
    """A rank that is not the first one, which sees the file or does not."""
    return SimpleNamespace(first=False, told=lambda ask: there)


def test_a_file_that_the_first_rank_sees_is_waited_for(tmp_path):
    """As a network file system shows it to another machine: later."""
    file = tmp_path / "manifest"
    shown = threading.Timer(0.3, file.touch)
    shown.start()
    await_file(file, other(True))
    assert file.exists()
    shown.join()


def test_nothing_is_waited_for_that_nobody_sees_and_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "_SHOWN", 0.3)
    waited = {}
    for there in (False, True):
        began = time.monotonic()
        await_file(tmp_path / "manifest", other(there))
        waited[there] = time.monotonic() - began
    assert waited[False] < 0.2
    assert waited[True] >= 0.3
