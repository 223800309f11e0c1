"""What a stage writes by itself, hidden states among it: what the system says of the disk names the file."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

from lbllm_cli.core.lock import locked
from lbllm_cli.pipeline.reporter import Reporter
from lbllm_cli.pipeline.streams import HiddenStream
from lbllm_cli.training.plots import plot_errors, plot_steps


def full(*_: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev"])
def test_a_disk_too_full_for_hidden_states_is_named_by_the_file(tmp_path, monkeypatch, call):
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        HiddenStream((2, 3, 4), torch.float32, tmp_path / "a.bin").write(slice(0, 1), torch.zeros(1, 3, 4))
    assert caught.value.filename == str(tmp_path / "a.bin")


def test_a_rank_without_rows_has_a_stream_on_disk(tmp_path):
    stream = HiddenStream((0, 3, 4), torch.float32, tmp_path / "a.bin")
    assert (stream.rows, (tmp_path / "a.bin").stat().st_size) == (0, 0)
    stream.remove()
    assert not list(tmp_path.iterdir())


def test_a_disk_too_full_for_a_record_is_named_by_the_file(tmp_path):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        Reporter("ptq", SimpleNamespace(blocks=1), tmp_path / "events.jsonl").record({})
    assert caught.value.filename == str(tmp_path / "events.jsonl")


@pytest.mark.parametrize(
    ("plot", "record"),
    [
        (plot_errors, json.dumps({"block": 0, **{when: {"error": 1.0, "error_ordinary": 1.0} for when in ("before", "after")}})),
        (plot_steps, json.dumps({"step": 1, "tokens": 8, "loss": 1.0})),
    ],
)
def test_a_disk_too_full_for_a_drawing_is_named_by_the_file(tmp_path, monkeypatch, plot, record):
    (tmp_path / "events.jsonl").write_text(f"{record}\n", encoding="utf-8")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        plot(tmp_path / "events.jsonl", tmp_path / "loss.png")
    assert caught.value.filename == str(tmp_path / "loss.png")


def test_a_disk_too_full_for_a_lock_is_named_by_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", full)
    with pytest.raises(OSError, match="No space left on device") as caught, locked(tmp_path):
        pytest.fail("locked")
    assert caught.value.filename == str(tmp_path / ".lock")
