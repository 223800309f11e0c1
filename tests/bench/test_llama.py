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


class Stub:
    """An engine that takes no time: files of llama.cpp are slower by half."""

    def __init__(self, python, path, threads, cpu):
        self.each = 0.002 if path.is_dir() else 0.003

    def ask(self, what, count):
        return self.each * count

    def memory(self):
        return 1e3 * self.each

    def end(self):
        pass


def comparison(tmp_path, monkeypatch, busy) -> list[str]:
    """What `llama.py` is asked for with two numbers of threads, and with cores that are as busy as `busy` says, one by one."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_bytes(bytes(60))
    monkeypatch.setattr(llama, "Process", Stub)
    monkeypatch.setattr(llama, "make_files", lambda source, out, python, kinds: {kind: tmp_path / kind for kind in kinds})
    monkeypatch.setattr(llama, "start_seconds", lambda *_: 1.0)
    monkeypatch.setattr(llama, "machine", lambda python: "this machine")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(llama, "busy_cores", iter(busy).__next__)
    (tmp_path / "Q2_K").write_bytes(bytes(80))
    return [
        "llama.py", "--packed", str(tmp_path / "export"), "--gguf", str(tmp_path / "source.gguf"), "--out", str(tmp_path / "out"),
        "--kinds", "Q2_K", "--rounds", "2", "--threads", "1", "2",
    ]  # fmt: skip


def test_a_comparison_leaves_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", comparison(tmp_path, monkeypatch, [0.0]))
    llama.main()
    found = (tmp_path / "out" / "table.md").read_text()
    assert "| token 512, 2 | 1024.00 ms | 1536.00 ms (0.67x) |" in found
    assert "| bytes | 0.0 MB | 0.0 MB (0.75x) |" in found
    assert found.endswith("\n\nthis machine\n")
    assert json.loads((tmp_path / "out" / "table.json").read_text())["machine"] == "this machine"
    assert len((tmp_path / "out" / "rounds.jsonl").read_text().splitlines()) == 2 * 2 * (len(llama.CONTEXTS) + len(llama.PROMPTS))


def test_cores_that_are_too_few_for_the_last_threads_are_found_before_the_first_round(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", comparison(tmp_path, monkeypatch, [1.0, 1.0]))
    with pytest.raises(SystemExit, match="with 2 threads times mean nothing"):
        llama.main()
    assert not (tmp_path / "out" / "rounds.jsonl").exists()


def test_files_are_made_once_for_each_source(tmp_path, monkeypatch):
    made = []

    def run(command, **_):
        made.append(command[-1])
        llama.Path(command[-1]).write_bytes(b"x")

    monkeypatch.setattr(llama.subprocess, "run", run)
    for content in (b"one", b"one", b"another"):
        (tmp_path / "source.gguf").write_bytes(content)
        assert llama.make_files(tmp_path / "source.gguf", tmp_path, "python", ["F16"])["F16"].exists()
    assert len(made) == len(set(made)) == 2


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
