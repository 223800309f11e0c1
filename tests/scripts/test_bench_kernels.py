"""The benchmark of the CPU kernels measures tiny shapes and a tiny model, and goes on where a file ends."""

import json
import runpy
import sys

import pytest
from conftest import ROOT

from lbllm_cli.engine.abi import library

SCRIPT = ROOT / "scripts" / "bench_kernels.py"
KERNEL = {"tier", "group_size", "level_bits", "granularity", "us", "gb_s", "bandwidth_share", "times_bfloat16", "times_float32"}
WORK = {"prefill", "decode", "generate"}

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels in this installation")


@pytest.fixture
def bench(monkeypatch):
    """Runs the script with these arguments, in this process: importing torch takes longer than all there is to measure."""

    def run(*arguments):
        monkeypatch.syspath_prepend(SCRIPT.parent)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *sizes, *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    sizes = ["--cache-mib", "1", "--rounds", "1", "--threads", "1"]
    return run


def numbers(record):
    return [x for value in record.values() for x in (numbers(value) if isinstance(value, dict) else [value])]


@pytest.mark.slow
def test_sections(bench, tmp_path, capsys):
    out = tmp_path / "kernels.json"
    bench("--out", out, "--only", "linear", "--shapes", "96:48", "--groups", 32, "--rows", 1)
    first = json.loads(out.read_text())
    assert first["machine"].keys() == {"cpu", "cores", "cache_bytes", "tier", "torch", "transformers"}
    assert first["linear"].keys() == {"96:48 1 1"}
    record = first["linear"]["96:48 1 1"]
    assert record.keys() == {"rounds", "read_gb_s", "torch_us", "kernels"}
    assert {kernel["tier"] for kernel in record["kernels"]} >= {"portable", first["machine"]["tier"]}
    assert {kernel["granularity"] for kernel in record["kernels"]} == {"group", "token"}
    for kernel in record["kernels"]:
        assert kernel.keys() == KERNEL
        assert kernel["us"] > 0
        assert kernel["times_bfloat16"] == pytest.approx(record["torch_us"]["bfloat16"] / kernel["us"])

    bench("--out", out, "--only", "quantizer", "--groups", 64)
    quantizer = json.loads(out.read_text())["quantizer"]
    assert quantizer.keys() == {"576 512 64 1", "1536 512 64 1"}
    for record in quantizer.values():
        assert {"torch", "portable", first["machine"]["tier"]} <= record.keys()
        assert record["torch"]["backward"]["times_torch"] == 1
        ours = record[first["machine"]["tier"]]["forward"]
        assert ours["times_torch"] == pytest.approx(record["torch"]["forward"]["ms"] / ours["ms"])

    bench("--out", out, "--random", "tiny", "--shapes", "96:48", "--groups", 32, "--rows", 1)
    whole = json.loads(out.read_text())
    assert whole["linear"] == first["linear"]  # not measured again
    model, floor = whole["model"]["random tiny, 1 threads"], whole["floor"]["random tiny, 1 threads"]
    assert model["tokens_per_second"].keys() == {"packed", "dense"}
    assert model["ratio"].keys() == model["tokens_per_second"]["packed"].keys() == WORK
    assert floor["tokens_per_second"].keys() == {"whole", "no_blocks", "no_head", "neither", "reading"}
    memory = whole["memory"]["random tiny"]
    assert memory.keys() == {"imports_bytes", "loaded_bytes", "peak_bytes", "files_bytes", "peak_ratio"}
    assert all(value > 0 for value in (*numbers(model), *numbers(floor), *numbers(memory)))
    # Two layers of q, k, v and o (64 x 64, 64 x 32 twice, 64 x 64) and an MLP (three of 64 x 128), groups of 32.
    assert floor["linears_bytes"] == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) * (2 / 8 + 6 / 32)
    assert floor["head_bytes"] == 256 * 64 * 2
    assert "random tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "floor"), "need --model or --random"),
        (("--only", "model", "--model", "folder"), "--model needs --base"),
        (("--rows", "0"), "at least 1"),
    ],
)
def test_arguments(bench, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench(*arguments)
    assert message in capsys.readouterr().err
