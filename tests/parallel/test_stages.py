"""Whole stages of several ranks on the toy: what they make, what is refused, how they are stopped."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import TOY, write_recipe
from parallel.processes import done, lbllm, run, started, variables
from safetensors.torch import load_file
from stages import events, promised

SHORT = {"epochs": 1, "batch_size": 4}
DISTILL = {**SHORT, "ema_decay": 0.9}
STAGES = ("ptq", "distill", "act-calib")


def recipe_of(folder: Path, **sections) -> Path:
    """The trained toy with an end-to-end phase that trains codes, short."""
    distill = {**DISTILL, "end_to_end": {"sequences": 8, "batch_size": 4, "train": ["weights", "levels", "norms"]}}
    # Of fewer tokens the order of a sum makes another model: a row's codes are a long chain of choices.
    text = {"source": str(folder / "chapter.txt"), "length": 128}
    data = {
        "calibration": {**text, "sequences": 44},
        "training": {**text, "sequences": 24},
        "evaluation": [{"name": "novels", "source": "builtin:evaluation/novels", "length": 128, "segments": 40}],
    }
    folder.mkdir(exist_ok=True)
    sections = {"data": data, "distill": distill, "act_calib": {**SHORT, "bits": 4, "kv_form": "uniform"}, **sections}
    return write_recipe(folder / "recipe.yaml", TOY, folder / "run", **sections)


def manifest(stage: Path) -> dict:
    return json.loads((stage / "lbllm_stage.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Every stage by one process."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = recipe_of(folder)
    for stage in (*STAGES, "eval"):
        done([{}], lbllm, stage, "--recipe", str(recipe))
    return folder


RANKS = [pytest.param((4, 2), id="4 ranks on 2 machines"), pytest.param((2, 2), id="2 ranks", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=RANKS)
def together(tmp_path_factory, request) -> Path:
    """Every stage by several."""
    folder = tmp_path_factory.mktemp("together")
    recipe = recipe_of(folder)
    for stage in (*STAGES, "eval"):
        done(variables(*request.param), lbllm, stage, "--recipe", str(recipe), seconds=150)
    return folder


@pytest.mark.heavy
def test_several_ranks_end_where_one_process_does(alone, together):
    """Measured, two and four ranks: at most 2.2 % of perplexity between `ptq` of one process and of several, which take other
    turns at a tie; what is trained after it moves that by at most 0.8 %, quantizers of 4 bits by 1.7 %."""
    mine, its = (json.loads((folder / "run" / "eval" / "results.json").read_text()) for folder in (together, alone))
    assert mine.keys() == its.keys() == {"base", "ptq", "distill", "distill-e2e", "act-calib"}
    apart = {stage: found["perplexity"]["novels"] / its[stage]["perplexity"]["novels"] for stage, found in mine.items()}
    # Nothing was made of the base model: segments are added up in another order, and no more.
    assert apart["base"] == pytest.approx(1, rel=1e-9)
    assert apart["ptq"] == pytest.approx(1, rel=0.03)
    for stage, most in {"distill": 0.015, "distill-e2e": 0.015, "act-calib": 0.03}.items():
        assert apart[stage] == pytest.approx(apart["ptq"], rel=most), stage
    assert mine["base"].keys() == its["base"].keys()
    for stage in ("ptq", "distill", "distill-e2e", "act-calib"):
        inputs = [manifest(folder / "run" / stage)["inputs"] for folder in (together, alone)]
        assert inputs[0].pop("ranks") in (2, 4)
        for made_from in inputs:
            made_from.pop("parent.files", None)
        assert inputs[0] == inputs[1]
        # One has written, and nothing of the others is left.
        assert {path.name for path in (together / "run" / stage).iterdir()} == {
            path.name for path in (alone / "run" / stage).iterdir()
        }
        records = [json.loads(line) for line in (together / "run" / stage / "events.jsonl").read_text().splitlines()]
        told = [record["ranks"] for record in records if "ranks" in record]
        assert told
        assert all(len(ranks) == len(told[0]) and ranks[0]["bytes"] for ranks in told)
    first = [load_file(folder / "run" / "ptq" / "block_000.safetensors") for folder in (together, alone)]
    assert all((first[0][name] == first[1][name]).all() for name in first[0] if "q_proj" in name)


@pytest.mark.heavy
def test_a_finished_stage_is_gone_on_from_with_any_number(ok, together):
    """By one process: up to date, and the parent of what comes."""
    recipe = together / "recipe.yaml"
    assert "up to date" in ok("distill", "--recipe", recipe).stderr
    copy = together / "run" / "act-calib"
    copy.rename(together / "kept")
    try:
        ok("act-calib", "--recipe", recipe)
        assert "ranks" not in manifest(copy)["inputs"]
    finally:
        for path in sorted(copy.rglob("*"), reverse=True):
            path.unlink()
        copy.rmdir()
        (together / "kept").rename(copy)


@pytest.mark.heavy
@pytest.mark.parametrize("streams", ["disk", pytest.param("ram", marks=pytest.mark.slow)])
def test_stopped_ranks_save_and_resume_to_the_same_bytes(tmp_path, lbllm_alone, streams):
    """SIGTERM to one of them: both save the step that they are in, and end with 130 and one message; as many go on from there."""
    settings = {"distill": {**DISTILL, "epochs": 8}, "runtime": {"device": "cpu", "streams": streams}}
    recipe, whole = (recipe_of(folder, **settings) for folder in (tmp_path, tmp_path / "whole"))
    done(variables(2), lbllm, "ptq", "--recipe", str(recipe))
    shutil.copytree(tmp_path / "run", tmp_path / "whole" / "run")
    done(variables(2), lbllm, "distill", "--recipe", str(whole))
    partial = tmp_path / "run" / "distill.partial"
    with started(variables(2), lbllm, "distill", "--recipe", str(recipe)) as ranks:
        ranks.until(lambda: (partial / "events.jsonl").exists() and (partial / "events.jsonl").read_text())
        # Between two blocks there is nothing to be saved.
        time.sleep(0.3)
        os.kill(ranks.processes[1].pid, signal.SIGTERM)
        ended = ranks.wait()
    assert [one.code for one in ended] == [130, 130]
    messages = [message for one in ended for message in one.messages]
    assert len(messages) == 1
    assert "run the same command again to resume" in messages[0]
    assert len(list(partial.glob("training.00?.safetensors"))) == 2
    # Their training is spread over two.
    result = lbllm_alone("distill", "--recipe", recipe)
    assert result.exit_code == 2
    assert "ranks: 2 -> absent" in result.stderr
    done(variables(2), lbllm, "distill", "--recipe", str(recipe))
    assert promised(tmp_path / "run" / "distill") == promised(tmp_path / "whole" / "run" / "distill")


@pytest.fixture
def lbllm_alone(lbllm):
    """The command line in this process."""
    return lbllm


@pytest.mark.heavy
def test_more_ranks_than_linears_train_together(alone, tmp_path):
    """As eight GPUs on a block of seven linears: one owns nothing, computes gradients all the same, and keeps what it has."""
    recipe = recipe_of(tmp_path, distill={"epochs": 2, "batch_size": 8}, runtime={"device": "cpu", "save_minutes": 0})
    shutil.copytree(alone / "run" / "ptq", tmp_path / "run" / "ptq")
    done(variables(8), lbllm, "distill", "--recipe", str(recipe), seconds=150)
    found, its = (events(folder / "run" / "distill") for folder in (tmp_path, alone))
    assert [len(record["ranks"]) for record in found] == [8] * len(its)
    for mine, other in zip(found, its, strict=True):
        # The same weights on the same held-out sequences, before any of them is trained.
        assert mine["before"]["error"] == pytest.approx(other["before"]["error"], rel=0.05)
        assert mine["epochs"][-1]["loss"] < 1.5


REFUSED = {
    "a sequence for every rank": (["ptq", "data.calibration.sequences=1", "ptq.asymmetric=0"], "sequences for 2 ranks; raise"),
    "a sequence in every step": (["distill", "distill.batch_size=1"], "distill.batch_size is 1, and 2 ranks"),
    "other commands": (["export"], "lbllm export runs in one process, 2 were started; run it without torchrun"),
    "one GPU": (["ptq", "runtime.device=cuda:0"], "runtime.device cuda:0: this torch sees no GPU"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("case", REFUSED)
def test_what_several_ranks_cannot_do_is_said_once(alone, case):
    arguments, message = REFUSED[case]
    command, *keys = arguments
    ended = run(variables(2), lbllm, command, "--recipe", str(alone / "recipe.yaml"), "--force", *keys)
    said = [line for one in ended for line in one.messages]
    assert [one.code for one in ended] == [2, 2]
    assert len(said) == 1
    assert message in said[0]


@pytest.mark.parametrize("arguments", [["config", "--list"], ["generate", "--model", "x", "--prompt", "y"]])
def test_commands_without_a_recipe_are_done_by_one_process(arguments):
    ended = run(variables(2), lbllm, *arguments)
    assert [one.code for one in ended] == [2, 2]
    assert [one.said for one in ended] == [
        f"lbllm: lbllm {arguments[0]} runs in one process, 2 were started; run it without torchrun\n", ""
    ]  # fmt: skip


def _with_own_recipe(recipes: list[str]) -> None:
    lbllm("ptq", "--recipe", recipes[int(os.environ["RANK"])])


@pytest.mark.heavy
def test_other_recipes_on_ranks_are_refused(tmp_path):
    recipes = [write_recipe(tmp_path / f"{size}.yaml", TOY, tmp_path / "run", ptq={"group_size": size}) for size in (32, 64)]
    ended = run(variables(2), _with_own_recipe, [str(recipe) for recipe in recipes])
    assert [one.code for one in ended] == [2, 2]
    said = [one.said for one in ended if one.messages]
    assert len(said) == 1
    assert "ptq.group_size: 32 on rank 0, 64 on rank 1" in said[0]


def _with_own_command(recipe: str) -> None:
    lbllm(("ptq", "distill")[int(os.environ["RANK"])], "--recipe", recipe)


@pytest.mark.heavy
def test_other_commands_on_ranks_are_refused(tmp_path):
    """Before one of them waits for what the other never says."""
    ended = run(variables(2), _with_own_command, str(write_recipe(tmp_path / "recipe.yaml", TOY, tmp_path / "run")))
    assert [one.code for one in ended] == [2, 2]
    said = [one.said for one in ended if one.messages]
    assert len(said) == 1
    assert "command: ptq on rank 0, distill on rank 1" in said[0]


def _in_own_folder(recipe: str, folders: list[str]) -> None:
    from lbllm_cli.pipeline import ranks

    # As long as a network file system may take is too long for a test.
    ranks._SHOWN = 1.0
    lbllm("ptq", "--recipe", recipe, f"output.dir={folders[int(os.environ['RANK'])]}")


@pytest.mark.heavy
def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", TOY, tmp_path / "run")
    ended = run(variables(2), _in_own_folder, str(recipe), [str(tmp_path / "here"), str(tmp_path / "there")])
    assert [one.code for one in ended] == [2, 2]
    said = [line for one in ended for line in one.messages]
    assert len(said) == 1
    assert "is not the folder that it is on" in said[0]
