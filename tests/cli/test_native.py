"""Which engine `lbllm generate` takes, and what it takes from a folder."""

import json
import shutil
from types import SimpleNamespace

import pytest

from lbllm_cli.cli import native
from lbllm_cli.cli.native import open_native, sampling_of
from lbllm_cli.engine.config import Unfit
from lbllm_cli.engine.location import library_path
from lbllm_cli.engine.model import Sampling

if library_path() is None:
    pytest.skip("this installation has no compiled kernels", allow_module_level=True)


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr(native, "has_gpu", lambda: False)


def test_a_gpu_needs_a_driver_and_a_torch_that_was_built_for_it(monkeypatch, tmp_path):
    monkeypatch.undo()
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(native, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    monkeypatch.setattr(native, "_DRIVERS", (str(tmp_path / "driver"),))
    assert not native.has_gpu()
    (tmp_path / "driver").touch()
    assert not native.has_gpu()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    assert native.has_gpu()
    (tmp_path / "driver").unlink()
    assert not native.has_gpu()
    monkeypatch.setattr(native, "find_spec", lambda _: None)
    (tmp_path / "driver").touch()
    assert not native.has_gpu()


@pytest.fixture
def folder(export_of, tmp_path):
    return shutil.copytree(export_of("llama-tied"), tmp_path / "export")


@pytest.fixture
def line(ok, folder):
    """Text and the line about speed."""

    def run(*options):
        result = ok("generate", "--model", folder, "--prompt", "the sea was", "--max-new-tokens", "12", *options)
        return result.stdout, result.stderr

    return run


def test_both_engines_write_the_same_text(line):
    text, said = line()
    assert "native engine" in said
    assert line("--engine", "native", "--device", "cpu")[0] == text
    other, said = line("--engine", "transformers")
    assert "transformers" in said
    assert other == text


def test_what_the_native_engine_does_not_do_is_done_by_transformers(line, folder, lbllm, monkeypatch):
    assert "transformers" in line("--full-activations")[1]
    (folder / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 2}))
    assert "transformers" in line()[1]
    result = lbllm("generate", "--model", folder, "--prompt", "x", "--engine", "native")
    assert result.exit_code == 2
    assert "--engine native cannot run" in result.stderr
    assert "no_repeat_ngram_size; take --engine transformers" in result.stderr
    (folder / "generation_config.json").unlink()
    assert "native engine" in line()[1]
    monkeypatch.setattr(native, "has_gpu", lambda: True)
    with pytest.raises(Unfit, match="runs on a CPU"):
        open_native(folder, "auto", 0.0, None)


def test_a_prompt_that_cannot_be_used_is_refused_before_a_weight_is_read(folder, lbllm, monkeypatch):
    monkeypatch.setattr(native, "Model", lambda *_: pytest.fail("weights are read"))
    for prompt, options, message in (
        ("the sea " * 200, (), "shorten it"),
        ("the sea", ("--max-new-tokens", "500"), "give at most"),
        ("", ("--raw",), "--prompt is empty"),
    ):
        result = lbllm("generate", "--model", folder, "--prompt", prompt, *options)
        assert result.exit_code == 2
        assert message in result.stderr
    assert "has no chat template" in lbllm("chat", "--model", folder).stderr


def test_weights_that_the_library_does_not_read_are_read_by_transformers(folder, line, lbllm, monkeypatch):
    def unfit(*_):
        raise Unfit("odd weights")

    monkeypatch.setattr(native, "Model", unfit)
    assert "transformers" in line()[1]
    result = lbllm("generate", "--model", folder, "--prompt", "x", "--engine", "native")
    assert "odd weights; take --engine transformers" in result.stderr


def test_drawn_text_depends_on_the_seed(line):
    drawn = [line("--temperature", "1.5", "--seed", seed)[0] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]


def test_threads(line):
    assert " 3 threads, native engine" in line("--threads", "3")[1]


def test_settings_of_a_folder():
    assert sampling_of({}, 0.7) == Sampling(0.7, top_k=50)
    values = {"top_k": 0, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "eos_token_id": [1], "typical_p": 1.0}
    assert sampling_of(values, 1.0) == Sampling(1.0, 0, 0.9, 0.1, 1.1)
    with pytest.raises(Unfit, match="typical_p"):
        sampling_of({"typical_p": 0.5}, 1.0)


@pytest.mark.parametrize(
    ("settings", "ends"), [({"eos_token_id": [3, 4]}, {3, 4}), ({"eos_token_id": 5}, {5}), ({}, set()), (None, {0})]
)
def test_tokens_that_end_a_text(folder, settings, ends):
    file = folder / "generation_config.json"
    if settings is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(json.dumps(settings))
    assert open_native(folder, "cpu", 0.0, 1).ends == ends
