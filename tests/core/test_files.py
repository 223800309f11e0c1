"""Files that are written whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lbllm_cli.core import files


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    files.write_json(file, {"b": 1, "a": 2})
    before = file.read_bytes()
    assert list(json.loads(before)) == ["b", "a"]

    def fail(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError("the end of the process")

    with pytest.raises(RuntimeError, match="the end"):
        files.write_atomic(file, fail)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.json", before)]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_file_has_the_mode_of_the_umask(tmp_path, mask):
    usual = os.umask(mask)
    try:
        (tmp_path / "left.tmp").touch(0o600)
        files.write_text(tmp_path / "left", "a")
        files.write_atomic(tmp_path / "tensors", lambda temporary: save_file({"a": torch.zeros(1)}, temporary))
    finally:
        os.umask(usual)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("left", "tensors"), 0o666 & ~mask
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28) at path \"/x/.tmpa\""),
    ],
)
def test_a_full_disk_is_named_by_the_file(tmp_path, error):
    def fail(temporary: Path) -> None:
        raise error

    with pytest.raises(OSError, match="No space left on device") as caught:
        files.write_atomic(tmp_path / "a", fail)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    assert not list(tmp_path.iterdir())


def test_errors_that_name_a_file_or_are_none_of_the_system_stay_as_they_are(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "gone", "b"), SafetensorError("a header"), ValueError("(os error 28)")):
        with pytest.raises(type(error)) as caught, files.naming(tmp_path / "a"):
            raise error
        assert caught.value is error
        assert getattr(error, "filename", "b") == "b"


def test_what_keeps_a_folder_from_being_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert files.unwritable(tmp_path) is files.unwritable(tmp_path / "new" / "one") is None
    assert files.unwritable(tmp_path / "file") == files.unwritable(tmp_path / "file" / "x")
    assert files.unwritable(tmp_path / "file" / "x") == f"{tmp_path / 'file'} is no folder; move it away"
    monkeypatch.chdir(tmp_path)
    assert files.unwritable(Path("new")) is None
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert files.unwritable(tmp_path / "new" / "x") == f"{tmp_path} is not a writable folder; let this user write there"
    assert files.unwritable(Path("new")) is None
