"""Exported toys of the tests of whole packed models."""

from pathlib import Path

import pytest
from conftest import save_toy
from packed_models import exported


@pytest.fixture(scope="module")
def export_of(tmp_path_factory):
    """export_of(family): its exported toy."""
    known: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in known:
            base = tmp_path_factory.mktemp(family)
            known[family] = exported(base, save_toy(base / "model", family), ptq={"rounds": 0})
        return known[family]

    return of
