"""A run that an earlier version wrote: it is up to date, is measured and exported as it was, and is gone on from."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import ASSETS, TOKENIZER_FILES, TOY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

OLD = ASSETS / "run-fa4ca70"
COMMANDS = {
    "ptq": ["ptq"],
    "distill": ["distill", "--only", "blocks"],
    "distill-e2e": ["distill", "--only", "end-to-end"],
    "act-calib": ["act-calib", "--only", "blocks"],
    "act-calib-e2e": ["act-calib", "--only", "end-to-end"],
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the run, with the tokenizer that its model has. stopped/distill.partial goes on from a ptq like the run's."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder, ignore=shutil.ignore_patterns("stopped"))
    for file in TOKENIZER_FILES:
        shutil.copyfile(TOY / file, folder / "model" / file)
    shutil.copytree(OLD / "stopped", folder / "stopped" / "distill.partial")
    shutil.copytree(OLD / "run" / "ptq", folder / "stopped" / "ptq")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file but the lock."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def resume(ok, old: Path) -> Path:
    """Finishes the stopped distillation; its folder."""
    output = old / "stopped"
    result = ok("distill", "--only", "blocks", "--recipe", old / "recipe.yaml", f"output.dir={output}")
    assert "resuming after block 1 of 2" in result.stderr
    assert not (output / "distill.partial").exists()
    return output / "distill"


def equal_codes(first: Path, second: Path) -> float:
    """Share of the bytes of codes that two block files have in common."""
    one, two = (load_file(file) for file in (first, second))
    assert {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in two.items()}
    codes = [name for name in one if name.endswith("_proj.weight")]
    assert len(codes) == 7
    return sum(int((one[name] == two[name]).sum()) for name in codes) / sum(one[name].numel() for name in codes)


def test_every_stage_is_up_to_date_and_nothing_changes(old, ok):
    before = contents(old)
    for stage, command in COMMANDS.items():
        assert f"{stage}: up to date, {old / 'run' / stage}\n" in ok(*command, "--recipe", old / "recipe.yaml").stderr
    assert contents(old) == before


def test_what_was_measured_is_not_measured_again(old, ok):
    before = contents(old)
    result = json.loads(ok("eval", "--recipe", old / "recipe.yaml", "--json").stdout)
    # What an entry is of is said since.
    assert [len(found.pop("checkpoint", "")) for found in result.values()] == [0] + [64] * (len(result) - 1)
    assert result == json.loads((OLD / "run/eval/results.json").read_text())
    table = next(name for name in before if str(name).endswith("eval/results.json"))
    after = contents(old)
    # What the names in the table stand for is said since.
    assert after.pop(table.replace("results.json", "measured/names.json"))
    assert {**after, table: None} == {**before, table: None}


def test_measured_anew_the_stages_are_what_they_were(old, ok):
    found = json.loads(ok("eval", "--recipe", old / "recipe.yaml", "--json", "--force").stdout)
    expected = json.loads((OLD / "run/eval/results.json").read_text())
    assert found.keys() == expected.keys() == {"base", *COMMANDS}
    for name, values in expected.items():
        # Another processor rounds otherwise.
        assert found[name]["perplexity"] == pytest.approx(values["perplexity"], rel=1e-3), name
        assert found[name]["bytes"] == values["bytes"]


def test_its_export_is_the_one_that_was_written(old, ok):
    ok("export", "--recipe", old / "recipe.yaml")
    wanted = json.loads((OLD / "export.json").read_text())
    found = json.loads((old / "run/export/lbllm_export.json").read_text())
    assert found["checkpoint"] == wanted["checkpoint"]
    assert found["files"]["model.safetensors"] == wanted["files"]["model.safetensors"]
    result = ok("eval", "--recipe", old / "recipe.yaml", "eval.checkpoints=[export]", "--json")
    perplexity = json.loads((OLD / "run/eval/results.json").read_text())["act-calib-e2e"]["perplexity"]
    assert json.loads(result.stdout)["export"]["perplexity"] == pytest.approx(perplexity, rel=1e-3)


def test_its_report_is_written(old, ok):
    ok("report", "--recipe", old / "recipe.yaml")
    page = next((old / "run").rglob("*.html")).read_text(encoding="utf-8")
    assert all(stage in page for stage in COMMANDS)


def test_a_stopped_stage_goes_on_to_what_an_unstopped_one_became(old, ok):
    finished, first, second = resume(ok, old), "block_000.safetensors", "block_001.safetensors"
    assert (finished / first).read_bytes() == (OLD / "run/distill" / first).read_bytes()
    # Trained here and not where the other was: some codes may be others. Of those that ptq gave, a sixth are.
    assert equal_codes(finished / second, OLD / "run/distill" / second) > 0.97
    assert equal_codes(finished / second, OLD / "run/ptq" / second) < 0.9
    inputs = [json.loads((folder / "lbllm_stage.json").read_text())["inputs"] for folder in (finished, OLD / "run/distill")]
    assert inputs[0] == inputs[1]


def test_the_training_that_was_kept_is_gone_on_from(old, ok):
    file = old / "stopped/distill.partial/training.safetensors"
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    latents = {name: -tensor for name, tensor in tensors.items() if name.endswith("/value") and tensor.shape[-1] == 16}
    assert len(latents) == 7
    save_file(tensors | latents, file, metadata=metadata)
    second = "block_001.safetensors"
    assert equal_codes(resume(ok, old) / second, OLD / "run/distill" / second) < 0.9
