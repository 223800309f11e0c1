"""The folder that keeps the teacher's last hidden states."""

import json
import shutil

import pytest
import torch
from stages import block_bytes, refused
from transformers import AutoModelForCausalLM

import lbllm_cli.hf  # noqa: F401 - packed folders
from lbllm_cli.core.errors import Interrupted
from lbllm_cli.core.lock import locked
from lbllm_cli.end_to_end import teacher as teacher_states
from lbllm_cli.pipeline import streams
from lbllm_cli.pipeline.plan import prepare
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.stages import STAGES as STAGE_SPECS
from lbllm_cli.recipe.stages import TABLE


def test_it_is_used_again(ok, run, tmp_path):
    folder = tmp_path / "teacher"
    ok("distill", "--recipe", run(distill={"teacher": str(folder)}))
    first = (folder / "states.bin").stat()
    expected = block_bytes(tmp_path / "run" / "distill-e2e")
    ok("distill", "--recipe", run(distill={"teacher": str(folder)}), "--only", "end-to-end", "--force")
    assert (folder / "states.bin").stat().st_mtime_ns == first.st_mtime_ns
    assert block_bytes(tmp_path / "run" / "distill-e2e") == expected
    # Where it lies is nothing that the checkpoint depends on.
    assert "up to date" in ok("distill", "--recipe", run(distill={}), "--only", "end-to-end").stderr
    assert not (tmp_path / "run" / "distill-e2e" / "streams").exists()


def test_states_are_the_whole_model_s(ok, made, run, tmp_path):
    folder = tmp_path / "teacher"
    recipe = run(distill={"teacher": str(folder), "epochs": 0})
    ok("distill", "--recipe", recipe)
    tokens = prepare(load_recipe(recipe, []), stages=TABLE).stage_tokens(STAGE_SPECS["distill-e2e"])
    model = AutoModelForCausalLM.from_pretrained(made[0]).eval()
    model.model.norm = torch.nn.Identity()
    with torch.no_grad():
        expected = model.model(tokens).last_hidden_state
    found = torch.from_file(str(folder / "states.bin"), size=expected.numel()).view(expected.shape)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("other_text", [False, True])
def test_an_interrupted_pass_goes_on_after_its_last_block(ok, lbllm, run, tmp_path, monkeypatch, other_text):
    whole, folder = tmp_path / "whole", tmp_path / "teacher"
    sequences = 24 if other_text else 25
    ok("distill", "--recipe", run(distill={"teacher": str(whole), "sequences": 25}), "--only", "end-to-end")
    passed = []

    def advance(block, inputs, *rest):
        passed.append(block.prefix)
        if len(passed) == 3:
            raise Interrupted("stopped")
        streams.advance(block, inputs, *rest)

    monkeypatch.setattr(teacher_states, "advance", advance)
    recipe = run(distill={"teacher": str(folder), "sequences": sequences})
    assert lbllm("distill", "--recipe", recipe, "--only", "end-to-end", "--force").exit_code == 130
    assert passed == [f"model.layers.{index}." for index in range(3)]
    # The third block's outputs are half written; the second one's are its inputs.
    assert {path.name for path in folder.glob("*.bin")} == {"entering_002.bin", "writing.bin"}
    recipe = run(distill={"teacher": str(folder), "sequences": 25})
    result = ok("distill", "--recipe", recipe, "--only", "end-to-end", "--force")
    # What was begun on other text is of no use.
    assert passed[3] == ("model.layers.0." if other_text else "model.layers.2.")
    assert ("the teacher goes on after block 2 of " in result.stderr) is not other_text
    assert (folder / "states.bin").read_bytes() == (whole / "states.bin").read_bytes()
    assert {path.name for path in folder.iterdir()} == {"states.bin", "lbllm_teacher.json", ".lock"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "states.bin").write_bytes(b"1234"), "states.bin is damaged (expected"),
        (lambda folder: (folder / "lbllm_teacher.json").write_text("{"), "lbllm_teacher.json is damaged"),
        (lambda folder: (folder / "lbllm_teacher.json").rename(folder / "notes.txt"), "holds other files"),
        (None, "holds the states of another model or text:\n  tokens: "),
    ],
)
def test_another_s_is_refused(ok, lbllm, run, tmp_path, change, message):
    folder = tmp_path / "teacher"
    ok("distill", "--recipe", run(distill={"teacher": str(folder), "epochs": 0}))
    if change:
        change(folder)
    other = run("other", distill={"teacher": str(folder), "sequences": 24 if change else 25})
    message_found = refused(lbllm, tmp_path / "run", "distill", "--recipe", other, "--only", "end-to-end", "--force")
    assert message in message_found


def test_one_process_writes_it(lbllm, run, tmp_path):
    folder = tmp_path / "teacher"
    with locked(folder, "another"):
        result = lbllm("distill", "--recipe", run(distill={"teacher": str(folder)}))
    assert result.exit_code == 2
    assert f"end_to_end.teacher {folder} is in use by process" in result.stderr


def test_states_of_several_ranks_may_lie_beside_those_of_one(ok, run, tmp_path):
    folder = tmp_path / "teacher"
    recipe = run(distill={"teacher": str(folder), "epochs": 0})
    ok("distill", "--recipe", recipe)
    shutil.copytree(folder, folder / "rank000of002", ignore=shutil.ignore_patterns("rank*"))
    for name in ("states.bin", "lbllm_teacher.json", ".lock"):
        (folder / name).unlink()
    again = ok("distill", "--recipe", recipe, "--only", "end-to-end", "--force")
    assert "the teacher's last hidden states are in" in again.stderr


def test_what_is_wrong_with_them_is_found_before_the_blocks(lbllm, run, tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    result = lbllm("distill", "--recipe", run(distill={"teacher": str(folder)}), "--force")
    assert result.exit_code == 2
    assert "holds other files (it holds notes.txt" in result.stderr
    assert "distill   1/" not in result.stderr


def test_of_another_model(ok, lbllm, run, tmp_path):
    folder = tmp_path / "teacher"
    ok("distill", "--recipe", run(distill={"teacher": str(folder), "epochs": 0}))
    record = json.loads((folder / "lbllm_teacher.json").read_text())
    (folder / "lbllm_teacher.json").write_text(json.dumps({**record, "model.files": "other"}))
    recipe = run(distill={"teacher": str(folder), "epochs": 0})
    found = refused(lbllm, tmp_path / "run", "distill", "--recipe", recipe, "--only", "end-to-end", "--force")
    assert "model.files: other -> " in found
