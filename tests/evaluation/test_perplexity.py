"""`lbllm eval`: the same numbers as models that are whole in memory, and nothing measured twice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_toy, write_recipe
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lbllm_cli.hf  # noqa: F401 - packed folders
from lbllm_cli.cli.app import app
from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.engine.abi import VARIABLE, library
from lbllm_cli.evaluation import perplexity as evaluation
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.report import figures as plots


@pytest.fixture(scope="session")
def made(once) -> Path:
    """A model, its ptq checkpoint and export."""

    def make(folder: Path) -> Path:
        recipe = write_recipe(folder / "recipe.yaml", save_toy(folder / "model"), folder / "run")
        for command in ("ptq", "export"):
            result = CliRunner().invoke(app, [command, "--recipe", str(recipe)], catch_exceptions=False)
            assert result.exit_code == 0, result.stderr
        return folder

    return once("ptq-export", make)


@pytest.fixture
def finished(made, tmp_path) -> Path:
    """A recipe whose ptq checkpoint and export are there."""
    for name in ("model", "run"):
        shutil.copytree(made / name, tmp_path / name)
    return write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", tmp_path / "run")


def test_an_export_is_known_by_its_weights(ok, lbllm, finished, tmp_path):
    """Also where only the middle of a file differs: stages that train levels leave the codes, at its ends, as they are."""
    command = ("eval", "--recipe", finished, "eval.checkpoints=[base, export]", "--json")
    first = json.loads(ok(*command).stdout)
    weights = tmp_path / "run" / "export" / "model.safetensors"
    written = weights.read_bytes()
    ok("ptq", "--recipe", finished, "--force", "ptq.rounds=0")
    assert "up to date" not in ok("export", "--recipe", finished).stderr
    second = json.loads(ok(*command).stdout)
    assert second["export"]["perplexity"] != first["export"]["perplexity"]
    middle = len(written) // 2
    changed = bytearray(weights.read_bytes())
    changed[middle] ^= 255
    weights.write_bytes(changed)
    result = lbllm(*command)
    assert result.exit_code == 2
    assert "model.safetensors changed since the export; run: lbllm export --recipe ... --force" in result.stderr
    assert "up to date" not in ok("export", "--recipe", finished).stderr
    weights.unlink()
    assert "up to date" not in ok("export", "--recipe", finished).stderr
    assert "up to date" in ok("export", "--recipe", finished).stderr
    assert json.loads(ok(*command).stdout) == second


def test_exports_of_equal_codes_are_measured_anew(ok, finished, tmp_path):
    from lbllm_cli.export import writer as exporting

    folder = tmp_path / "run" / "export"
    before = exporting.content(folder)
    record = json.loads((folder / "lbllm_export.json").read_text())
    record["files"]["model.safetensors"] = "0" * 64
    (folder / "lbllm_export.json").write_text(json.dumps(record))
    assert exporting.content(folder) != before
    (folder / "lbllm_export.json").write_text(json.dumps({key: record[key] for key in record if key != "files"}))
    with pytest.raises(UsageError, match="does not say what the export holds"):
        exporting.content(folder)


@torch.no_grad()
def test_streamed_equals_whole_models_in_memory(ok, finished, tmp_path):
    from lbllm_cli.pipeline.plan import prepare

    results = json.loads(ok("eval", "--recipe", finished, "eval.checkpoints=[base, ptq, export]", "--json").stdout)
    tokens = prepare(load_recipe(finished, []), evaluate=True).evaluation()["novels"]
    teacher, student = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (tmp_path / "model", tmp_path / "run/export"))
    p, q = (torch.log_softmax(model(tokens).logits[:, :-1].double(), -1) for model in (teacher, student))
    for name, predicted in (("base", p), ("ptq", q), ("export", q)):
        nll = -predicted.gather(-1, tokens[:, 1:, None]).mean()
        assert results[name]["perplexity"]["novels"] == pytest.approx(float(nll.exp()), rel=1e-5), name  # measured 1e-7
    assert results["ptq"]["kl"]["novels"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)  # 2e-6
    assert results["ptq"]["top1"]["novels"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-6)
    assert not {"kl", "top1"} & set(results["base"])
    assert results["export"]["bits_per_weight"] == results["ptq"]["bits_per_weight"]


@torch.no_grad()
def test_errors_along_the_depth_are_those_of_the_hidden_states(ok, finished, tmp_path):
    from lbllm_cli.pipeline.plan import prepare

    ok("eval", "--recipe", finished)
    details = json.loads((tmp_path / "run/eval/details.json").read_text())
    tokens = prepare(load_recipe(finished, []), evaluate=True).evaluation()["novels"]
    full, student = (
        AutoModelForCausalLM.from_pretrained(folder)(tokens, output_hidden_states=True).hidden_states
        for folder in (tmp_path / "model", tmp_path / "run/export")
    )
    blocks = details["ptq"]["novels"]["blocks"]
    assert len(blocks) == 3
    # The last of transformers' hidden states has gone through the final norm.
    for block, a, b in list(zip(blocks, full[1:], student[1:], strict=True))[:-1]:
        assert block["relative"] == pytest.approx(float((a - b).square().sum() / a.square().sum()), rel=1e-3)  # 2e-6
        assert block["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=-1).mean()), rel=1e-4)
        assert block["decibels"] == pytest.approx(-10 * torch.tensor(block["relative_ordinary"]).log10().item(), rel=1e-4)
    assert details["base"]["novels"]["positions"][-1]["last"] == 31
    assert "blocks" not in details["base"]["novels"]


def test_what_is_known_is_not_measured_again(ok, finished, monkeypatch):
    first = ok("eval", "--recipe", finished, "--json").stdout
    seen = []
    run = evaluation.Evaluation.run
    spy = lambda self, *given: seen.append((list(self.checkpoints), given[1])) or run(self, *given)  # noqa: E731
    monkeypatch.setattr(evaluation.Evaluation, "run", spy)
    assert ok("eval", "--recipe", finished, "--json").stdout == first
    assert seen == []
    text = '{"name":"more","source":"builtin:evaluation/modern","length":32,"segments":2}'
    both = f'data.evaluation=[{{"name":"novels","source":"builtin:evaluation/novels","length":32,"segments":4}},{text}]'
    added = json.loads(ok("eval", "--recipe", finished, "--json", both).stdout)
    assert seen == [(["ptq"], {"novels": [], "more": ["base", "ptq"]})]
    assert added["ptq"]["perplexity"]["novels"] == json.loads(first)["ptq"]["perplexity"]["novels"]
    assert ok("eval", "--recipe", finished, "--json", "--force").stdout == first
    assert len(seen) == 2


def test_a_new_checkpoint_is_measured_and_the_old_ones_are_not(ok, finished, monkeypatch):
    before = json.loads(ok("eval", "--recipe", finished, "--json").stdout)
    ok("ptq", "--recipe", finished, "ptq.rounds=0", "--force")
    seen = []
    run = evaluation.Evaluation.run
    monkeypatch.setattr(evaluation.Evaluation, "run", lambda self, *a: seen.append(a[1]) or run(self, *a))
    after = json.loads(ok("eval", "--recipe", finished, "ptq.rounds=0", "--json").stdout)
    assert seen == [{"novels": ["ptq"]}]
    assert after["ptq"]["perplexity"] != before["ptq"]["perplexity"]
    assert after["base"] == before["base"]


def test_a_damaged_measurement_is_made_again(ok, finished, tmp_path):
    first = ok("eval", "--recipe", finished, "--json").stdout
    for file in (tmp_path / "run/eval/measured").glob("*.json"):
        file.write_text(file.read_text()[:40])
    assert ok("eval", "--recipe", finished, "--json").stdout == first


def test_a_model_whose_predictions_overflow_is_named(lbllm, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_toy(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = lbllm("eval", "--recipe", write_recipe(tmp_path / "r.yaml", folder, tmp_path / "run"))
    assert result.exit_code == 1
    assert "base: a prediction on novels is NaN" in result.stderr


def test_kernels_that_are_not_here_are_refused_before_anything_is_measured(finished, lbllm, monkeypatch):
    monkeypatch.setenv(VARIABLE, "fastest")
    library.cache_clear()
    result = lbllm("eval", "--recipe", finished, "eval.checkpoints=[base, export]")
    library.cache_clear()
    assert result.exit_code == 2
    assert "LBLLM_KERNELS=fastest: expected auto" in result.stderr
    assert not (finished.parent / "run" / "eval").exists()


def test_an_export_that_cannot_be_loaded(finished, lbllm, tmp_path):
    config = tmp_path / "run/export/config.json"
    config.write_text(config.read_text().replace('"format_version": 1', '"format_version": 9'))
    # As a later version would have written it.
    record = tmp_path / "run/export/lbllm_export.json"
    values = json.loads(record.read_text())
    values["files"]["config.json"] = files.sha256(config)
    record.write_text(json.dumps(values))
    result = lbllm("eval", "--recipe", finished, "eval.checkpoints=[export]")
    assert result.exit_code == 2
    assert "export cannot be loaded: packed format_version 9" in result.stderr


def test_export_must_be_there_to_be_measured(lbllm, recipe):
    result = lbllm("eval", "--recipe", recipe, "eval.checkpoints=[base, export]")
    assert result.exit_code == 2
    assert "run: lbllm export" in result.stderr


def test_a_stage_that_overflows_leaves_the_others_and_what_was_measured(ok, lbllm, finished, tmp_path, monkeypatch):
    """base and ptq are measured, then the predictions of one of them are not finite on a text that is added."""
    first = json.loads(ok("eval", "--recipe", finished, "--json").stdout)
    text = '{"name":"more","source":"builtin:evaluation/modern","length":32,"segments":2}'
    both = f'data.evaluation=[{{"name":"novels","source":"builtin:evaluation/novels","length":32,"segments":4}},{text}]'
    run = evaluation.Evaluation.run

    def overflowing(self, *given):
        read = Checkpoint.read_block

        def infinite(checkpoint, index):
            stored = read(checkpoint, index)
            scale = next(name for name in stored if name.endswith(".scale"))
            return {**stored, scale: torch.full_like(stored[scale], torch.inf)}

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "read_block", infinite)
            return run(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "run", overflowing)
        result = lbllm("eval", "--recipe", finished, both, "--json")
    assert result.exit_code == 1
    assert "ptq: a prediction on more is NaN or infinity" in result.stderr
    assert "base" not in result.stderr.partition("lbllm: ")[2]
    kept = json.loads((tmp_path / "run/eval/results.json").read_text())
    assert json.loads(result.stdout) == kept
    assert kept["ptq"]["perplexity"] == first["ptq"]["perplexity"]
    assert kept["base"]["perplexity"].keys() == {"novels", "more"}
    seen = []
    monkeypatch.setattr(evaluation.Evaluation, "run", lambda self, *a: seen.append(a[1]) or run(self, *a))
    again = json.loads(ok("eval", "--recipe", finished, both, "--json").stdout)
    assert seen == [{"novels": [], "more": ["ptq"]}]
    assert again["ptq"]["perplexity"].keys() == {"novels", "more"}
    monkeypatch.setattr(plots, "draw", lambda alt, paint, height=0: plots.Image(alt, "", ""))
    ok("report", "--recipe", finished)


def test_an_export_that_overflows_is_named(lbllm, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("lbllm_cli.evaluation.run.whole_perplexity", lambda model, tokens, device: None)
    result = lbllm("eval", "--recipe", finished, "eval.checkpoints=[base, export]")
    assert result.exit_code == 1
    assert "export: a prediction on novels is NaN or infinity" in result.stderr
    assert list(json.loads((tmp_path / "run/eval/results.json").read_text())["base"]["perplexity"]) == ["novels"]


@pytest.mark.parametrize(
    "found",
    [None, 7, [], {}, {"perplexity": "x"}, {"perplexity": None}, {"perplexity": 0.5}, {"perplexity": 9.0, "blocks": 3},
     {"perplexity": 9.0, "positions": [{"first": "1"}]}, {"perplexity": 9.0, "kl": [1]}],
    ids=str,
)  # fmt: skip
def test_a_measurement_of_another_kind_is_made_again(ok, finished, tmp_path, found, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda alt, paint, height=0: plots.Image(alt, "", ""))
    first = ok("eval", "--recipe", finished, "--json").stdout
    for file in (tmp_path / "run/eval/measured").glob("*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "found": found}))
    ok("report", "--recipe", finished)
    assert ok("eval", "--recipe", finished, "--json").stdout == first


@pytest.mark.parametrize(
    "record", ["[]", "7", "null", '{"files": []}', '{"files": {"../../x": "0"}}', '{"files": {"a": 1}}', "[" * 9999], ids=range(7)
)
def test_the_record_of_an_export_with_values_of_other_kinds(lbllm, ok, finished, tmp_path, record):
    file = tmp_path / "run/export/lbllm_export.json"
    file.write_text(record)
    result = lbllm("eval", "--recipe", finished, "eval.checkpoints=[base, export]")
    assert result.exit_code == 2
    assert f"{file} does not say what the export holds; run: lbllm export" in result.stderr
    ok("export", "--recipe", finished)
    ok("eval", "--recipe", finished, "eval.checkpoints=[base, export]")
