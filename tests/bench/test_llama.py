"""scripts/bench/llama.py and random_export.py: what is compared is of one shape, and the table says what was measured."""

import importlib.util
import json

import numpy as np
import pytest
from conftest import ROOT

from lbllm_cli.engine.location import library_path
from lbllm_cli.engine.model import Model, Session

pytest.importorskip("gguf")
if library_path() is None:
    pytest.skip("this installation has no compiled kernels", allow_module_level=True)

SMALL = {
    "hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64,
    "num_hidden_layers": 2, "vocab_size": 100, "rope_theta": 10000.0,
}  # fmt: skip


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


llama, random_export = script("llama"), script("random_export")


def test_a_random_export_runs_and_its_gguf_has_the_same_shapes(tmp_path):
    import gguf

    random_export.write_export(SMALL, tmp_path / "export")
    random_export.write_gguf(SMALL, tmp_path / "source.gguf")
    logits = Session(Model(tmp_path / "export", 1)).run([1, 2, 3])
    assert logits.shape == (100,)
    assert np.isfinite(logits).all()
    assert logits.std() > 0
    reader = gguf.GGUFReader(tmp_path / "source.gguf")
    shapes = {tensor.name: tuple(int(extent) for extent in tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight"] == (320, 192)
    assert shapes["token_embd.weight"] == (192, 100)
    assert len(shapes) == 2 + 2 * 9


def test_seconds_are_of_the_question_and_equal_tokens_for_both():
    asked = []

    class Engine:
        def run(self, tokens):
            asked.append(len(tokens))
            return 7

        def keep(self, count):
            assert count == 0

    assert llama.measure(Engine(), "prompt", 33, cpu=False) >= 0
    assert asked == [33]
    asked.clear()
    llama.measure(Engine(), "token", 16, cpu=True)
    assert asked == [16] + [1] * llama.DECODED
    assert max(llama.tokens_of(3000)) < llama.VOCABULARY + 7


def test_the_table_has_a_ratio_and_its_spread_behind_every_figure_of_theirs():
    own, theirs = [0.004, 0.005, 0.004], [0.008, 0.008, 0.016]
    assert llama.figure(theirs, own) == {"value": 0.008, "ratio": 0.5, "least": 0.25, "most": 0.625}
    rows = {
        "lbllm": {"token 16, 1": llama.figure(own, own), "bytes": llama.figure([6e7], [6e7])},
        "Q2_K": {"token 16, 1": llama.figure(theirs, own), "bytes": llama.figure([8e7], [6e7])},
    }
    assert llama.table(rows).splitlines()[2:] == [
        "| token 16, 1 | 4.00 ms | 8.00 ms (0.50x, 0.25 to 0.62) |", "| bytes | 60.0 MB | 80.0 MB (0.75x) |",
    ]  # fmt: skip


def test_a_busy_machine_is_refused(monkeypatch):
    monkeypatch.setattr(llama, "busy_cores", lambda: 1.5)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(SystemExit, match=r"1\.5 of 2 cores are busy"):
        llama.check_load(1)
    monkeypatch.setattr(llama, "busy_cores", lambda: 0.1)
    llama.check_load(2)


def test_the_work_process_answers_line_by_line(tmp_path):
    random_export.write_export({**SMALL, "vocab_size": llama.VOCABULARY + 7}, tmp_path / "export")
    process = llama.Process(llama.sys.executable, tmp_path / "export", 1, cpu=True)
    try:
        assert process.ask("prompt", 20) > 0
        assert process.ask("token", 4) > 0
        assert process.memory() > 10
    finally:
        process.end()
    assert json.dumps(process.child.returncode) == "0"
