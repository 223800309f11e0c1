"""Files that are written whole or not at all."""

import json
from pathlib import Path

import pytest

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
