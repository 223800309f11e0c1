"""`lbllm eval` and `lbllm export` take stages as they are, and say which keys of a recipe that makes untrue."""

import shutil

import pytest
from conftest import save_toy, write_recipe


@pytest.fixture
def recipe(ok, tmp_path, given_tables):
    """A recipe of a run of ptq, and of act-calib behind it."""
    toy = save_toy(tmp_path / "model", num_hidden_layers=1)
    sections = {"ptq": {"rounds": 0}, "act_calib": {"parent": "ptq", "epochs": 0}}
    path = write_recipe(tmp_path / "recipe.yaml", toy, tmp_path / "run", **sections)
    for stage in ("ptq", "act-calib"):
        ok(stage, "--recipe", path)
    return path


@pytest.fixture
def warned(ok, recipe):
    """warned(command, *keys): the stages and the keys that a command warns of, with what they were and are."""

    def of(command, *keys):
        said = ok(command, "--dry-run", "--recipe", recipe, *keys).stderr
        _, warning, after = said.partition(f"{command}: warning: ")
        if not warning:
            return "", {}
        first, *lines = after.splitlines()
        assert "came of other keys" in first
        own = dict(line.strip().split(": ", 1) for line in lines if line.startswith("  "))
        assert lines[len(own)].startswith("Set these keys back, or run: lbllm ")
        return first.partition(" in ")[0], own

    return of


@pytest.mark.parametrize("command", ["eval", "export"])
def test_keys_of_the_stages_are_named_and_no_others(warned, command):
    assert warned(command) == ("", {})
    # Of a stage that is not among them, of how it is run, of what is measured and written.
    others = ["distill.epochs=7", "distill.end_to_end.sequences=4", "runtime.batch_size=3", "eval.limit=3", "export.shard_gb=2"]
    assert warned(command, *others) == ("", {})
    found = warned(command, "ptq.group_size=64", "act_calib.epochs=1", "data.calibration.length=16", *others)
    keys = {"ptq.group_size": "32 -> 64", "act_calib.epochs": "0 -> 1", "data.calibration.length": "32 -> 16"}
    assert found == ("ptq, act-calib", keys)
    assert warned(command, "act_calib.parent=distill") == ("act-calib", {"act_calib.parent": "ptq -> distill"})


def test_what_is_measured_alone_counts(warned):
    assert warned("eval", "eval.checkpoints=[ptq]", "act_calib.lr_weights=0.5") == ("", {})
    assert warned("eval", "eval.checkpoints=[base]", "ptq.group_size=64") == ("", {})
    # What `eval` computes in is its own to choose; an export does not depend on it.
    assert warned("eval", "model.dtype=bfloat16") == ("", {})
    assert warned("export", "model.dtype=bfloat16") == ("ptq, act-calib", {"model.dtype": "source -> bfloat16"})


def test_a_stage_whose_first_stage_is_gone_is_bound_to_its_groups(warned, tmp_path):
    shutil.rmtree(tmp_path / "run" / "ptq")
    assert warned("export", "ptq.damping=0.5") == ("", {})
    assert warned("export", "ptq.group_size=64") == ("act-calib", {"ptq.group_size": "32 -> 64"})


def test_a_section_that_is_gone_is_one_key(ok, recipe, warned):
    ok("distill", "--recipe", recipe, "distill.epochs=0", "distill.end_to_end={sequences: 4, epochs: 1, batch_size: 2}")
    assert warned("export", "export.checkpoint=distill-e2e", "distill.epochs=0") == (
        "distill-e2e",
        {"distill.end_to_end": "given -> absent"},
    )
