"""Kernels compile for every GPU that is recorded, spill nothing, and use the instructions that they were written for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RECORD = json.loads((Path(__file__).parent / "statistics.json").read_text())


def test_the_record_shows_the_instructions():
    cases = RECORD["cases"]
    for architecture in (80, 89, 90, 100, 120):
        decode, prefill = (cases[f"{name}, sm_{architecture}"] for name in ("gemv, 1 row", "gemm, 2048 rows"))
        # Four rows of 64 codes a lane: 16 words, four looked up and multiplied at once.
        assert decode["PRMT"] >= decode["dp4a"] == 64
        assert decode["all"] < 2.2 * 256
        assert prefill["integer MMA"] > 0
    assert not any(case["spills"] for case in cases.values())


@pytest.mark.heavy
def test_what_is_compiled_is_what_was_recorded(tmp_path):
    triton = pytest.importorskip("triton")
    if triton.__version__ != RECORD["triton"]:
        pytest.skip(f"recorded with Triton {RECORD['triton']}, this is {triton.__version__}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)

    def script(argument: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "scripts" / "kernel_statistics.py"), argument]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    # The same kernels give the same record: they are compiled, two minutes, where one was changed.
    if script("--sources").stdout.strip() != RECORD["sources"]:
        done = script("--check")
        assert done.returncode == 0, done.stderr
