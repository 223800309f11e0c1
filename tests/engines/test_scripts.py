"""The scripts that measure engines, on a toy: `make serve-test`."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, save_toy
from packed_models import exported

pytest.importorskip("vllm", reason="vLLM is not installed here: make serve-test")

pytestmark = pytest.mark.slow


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, ROOT / "scripts" / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("scripts")
    toy = save_toy(base / "model", "llama-tied", head_dim=32, hidden_size=128, max_position_embeddings=2048)
    return exported(base, toy, ptq={"rounds": 0})


def test_engines_are_compared(export, tmp_path):
    text = tmp_path / "text.json"
    run("engines.py", "text", export, "--length", 64, "--segments", 2, "--out", text)
    for engine in ("transformers", "vllm"):
        run("engines.py", "run", engine, export, "--text", text, "--out", tmp_path)
    assert "is there already" in run("engines.py", "run", "vllm", export, "--text", text, "--out", tmp_path)
    rows = [line.split("|") for line in run("engines.py", "table", "--text", text, "--out", tmp_path).splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["transformers run", "vllm run"]
    # Codes that tip over after some tokens, and nothing else.
    assert float(rows[1][3]) == pytest.approx(float(rows[0][3]), rel=0.05)
    assert float(rows[0][4]) == 0


def test_a_server_is_loaded(export):
    said = run("serve_load.py", "--model", export, "--requests", 6, "--together", 3, "--", "--enforce-eager")
    rows = [line.split("|") for line in said.splitlines()[2:]]
    assert [int(row[1]) for row in rows] == [3, 6]
    assert all(float(row[4]) > 0 and float(row[5]) > 100 for row in rows)
