"""One process per output folder."""

import errno
import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.lock import locked


@pytest.mark.parametrize("content", ["mine", "12 34", "é"])
def test_a_lock_that_is_somebody_elses_file(tmp_path, content):
    (tmp_path / ".lock").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"\.lock is not lbllm's"), locked(tmp_path):
        pytest.fail("locked")
    assert (tmp_path / ".lock").read_text(encoding="utf-8") == content
    (tmp_path / ".lock").unlink()
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / ".lock").symlink_to(tmp_path / "file")
    with pytest.raises(UsageError, match=r"\.lock is a link"), locked(tmp_path):
        pytest.fail("locked")
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UsageError, match=r"\.lock is a folder"), locked(tmp_path):
        pytest.fail("locked")


def _hold(output: Path, channel) -> None:
    with locked(output):
        channel.send("held")
        channel.recv()


def test_one_process_per_output_folder(tmp_path):
    output = tmp_path / "deep" / "out"
    context = multiprocessing.get_context("fork")  # spawning would load torch again
    here, there = context.Pipe()
    other = context.Process(target=_hold, args=(output, there), daemon=True)
    other.start()
    try:
        assert here.poll(20)
        assert here.recv() == "held"
        with pytest.raises(UsageError, match=rf"is in use by process {other.pid}; wait for it"), locked(output):
            pytest.fail("two processes hold the folder")
    finally:
        other.kill()
        other.join()
    with locked(output):  # the lock ended with its process
        assert (output / ".lock").read_text(encoding="utf-8") == str(os.getpid())
    with locked(output):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_somebody_who_holds_one(tmp_path, monkeypatch, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".lock").write_text("4242", encoding="utf-8")
    with pytest.raises(UsageError, match=r"cannot be locked: .*file system has no locks"), locked(tmp_path):
        pytest.fail("locked")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be written: Not a directory"), locked(tmp_path / "file" / "out"):
        pytest.fail("locked")
