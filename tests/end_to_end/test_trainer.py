"""The last phase over the whole model: exact start, gradients, what is stored, resume, fresh text, and what is refused."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from phases import phase, student_of
from safetensors.torch import load_file
from stages import BLOCKS, block_bytes, events, hashes, refused

import lbllm_cli.hf  # noqa: F401 - packed folders
from lbllm_cli.core import interrupt
from lbllm_cli.core.errors import Interrupted
from lbllm_cli.data.tokens import Draw, training_tokens
from lbllm_cli.end_to_end import stage as end_to_end_stage
from lbllm_cli.end_to_end import trainer as end_to_end
from lbllm_cli.end_to_end.trainer import EndToEndObjective
from lbllm_cli.models.model import FINAL_NORM
from lbllm_cli.parallel.group import ALONE
from lbllm_cli.pipeline.lineage import stage_inputs
from lbllm_cli.pipeline.plan import prepare
from lbllm_cli.pipeline.stage_record import OUTER
from lbllm_cli.pipeline.training_state import TrainingState
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.stages import STAGES as STAGE_SPECS
from lbllm_cli.recipe.stages import TABLE
from lbllm_cli.recipe.training import DistillEndToEnd
from lbllm_cli.training.progress import Progress


@pytest.mark.parametrize("stage", ["distill", "act-calib"])
def test_no_epochs_return_the_parent_byte_for_byte(ok, run, tmp_path, stage):
    began = time.monotonic()
    ok(stage, "--recipe", run(**{stage.replace("-", "_"): {"epochs": 0}}))
    made, parent = tmp_path / "run" / f"{stage}-e2e", tmp_path / "run" / stage
    assert block_bytes(made) == block_bytes(parent)
    assert not (made / OUTER).exists()
    manifest, before = (json.loads((folder / "lbllm_stage.json").read_text()) for folder in (made, parent))
    assert manifest["parent"] == {"stage": stage, "fingerprint": before["fingerprint"]}
    assert manifest["tokens"] == 24 * 32
    # The teacher's pass and the blocks that are written take time as well.
    assert 0 < phase(made)["seconds"] < time.monotonic() - began
    assert manifest.get("activations") == before.get("activations")


@pytest.mark.parametrize("stage", ["distill", "act-calib"])
def test_training_lowers_the_divergence_and_what_is_stored_is_what_is_measured(ok, run, tmp_path, stage, in_torch):
    recipe = run(**{stage.replace("-", "_"): {"sequences": 80, "lr_levels": 0.005, "lr_norms": 0.01}})
    ok(stage, "--recipe", recipe)
    facts = phase(tmp_path / "run" / f"{stage}-e2e")
    assert facts["best_epoch"] == 1
    assert facts["after"]["kl"] < 0.96 * facts["before"]["kl"]  # measured 0.95 and 0.92
    ok("export", "--recipe", recipe, f"export.checkpoint={stage}-e2e")
    wanted = f"eval.checkpoints=[base, {stage}, {stage}-e2e, export]"
    results = json.loads(ok("eval", "--recipe", recipe, wanted, "--json").stdout)
    after = results[f"{stage}-e2e"]
    ok("report", "--recipe", recipe)
    page = (tmp_path / "run" / "report.md").read_text()
    assert f"{facts['before']['kl']:.3f} → {facts['after']['kl']:.3f}" in page
    assert f"Training loss of {stage}-e2e over the tokens" in (tmp_path / "run" / "report.html").read_text()
    assert after["kl"]["novels"] < results[stage]["kl"]["novels"]
    assert results["export"]["perplexity"]["novels"] == pytest.approx(after["perplexity"]["novels"], rel=1e-4)
    assert results["export"]["bits_per_weight"] == after["bits_per_weight"] == results[stage]["bits_per_weight"]


def test_a_phase_that_makes_nothing_better_says_so(ok, run, tmp_path):
    said = ok("distill", "--recipe", run(distill={"sequences": 6, "lr_levels": 0.9, "lr_norms": 0.9})).stderr
    facts = phase(tmp_path / "run" / "distill-e2e")
    before, after = facts["before"]["error"], facts["epochs"][0]["held_out"]["error"]
    line = f"distill-e2e: no epoch was better: held-out loss {before:.4f} at the start, {after:.4f} after epoch 1; "
    rates = "distill.end_to_end.lr_levels, distill.end_to_end.lr_norms"
    assert f"{line}the checkpoint is that of distill; lower {rates}\n" in said
    assert block_bytes(tmp_path / "run" / "distill-e2e") == block_bytes(tmp_path / "run" / "distill")
    again = run("still", distill={"sequences": 6, "epochs": 0})
    assert "no epoch" not in ok("distill", "--recipe", again, "--only", "end-to-end", "--force").stderr


@pytest.mark.slow
@pytest.mark.parametrize(("train", "moved"), [("levels", {"levels", "scale"}), ("scales", {"scale"}), ("norms", {"weight"})])
def test_only_what_is_named_is_trained(ok, made, run, tmp_path, train, moved):
    ok("distill", "--recipe", run(distill={"train": [train], "sequences": 100, "lr_levels": 0.003}))
    folders = [tmp_path / "run" / stage for stage in ("distill", "distill-e2e")]
    source = load_file(made[0] / "model.safetensors")
    for file in BLOCKS:
        before, after = (load_file(folder / file) for folder in folders)
        changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
        assert {name.rpartition(".")[2] for name in changed if "norm" not in name} == moved - {"weight"}
        norms = {name for name in changed if "norm" in name}
        assert all(name not in before for name in norms)
        stated = [name for name in norms if not torch.equal(after[name], source[name])]
        assert bool(stated) == (train == "norms")
    assert phase(folders[1])["best_epoch"] == 1


def test_quantizers_are_trained_with_knees(ok, run, tmp_path, monkeypatch):
    # Whether an epoch of so little text helps a toy is chance: it counts as better.
    monkeypatch.setattr(EndToEndObjective, "score", lambda self, held, start: (0.5, True))
    ok("act-calib", "--recipe", run(act_calib={"train": ["clip_factors", "knees"], "lr_clip_factors": 0.02}))
    assert phase(tmp_path / "run" / "act-calib-e2e")["best_epoch"] == 1
    before, after = (
        {} | {n: t for f in BLOCKS for n, t in load_file(tmp_path / "run" / stage / f).items()}
        for stage in ("act-calib", "act-calib-e2e")
    )
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert {"act_clip"} <= changed <= {"act_clip", "act_levels", "act_zero"}


@pytest.mark.parametrize("changes", [{}, {"train": ["weights", "levels", "norms"], "lr_weights": 0.02}], ids=["levels", "codes"])
def test_a_resumed_run_equals_an_uninterrupted_one(ok, lbllm, run, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(end_to_end, "_RECORDS", 4)
    recipe = run(distill={"epochs": 2, **changes})
    ok("distill", "--recipe", recipe)
    expected = hashes(tmp_path / "run" / "distill-e2e")
    shutil.rmtree(tmp_path / "run" / "distill-e2e")
    saves, save = [], TrainingState.save

    def saved(self, tensors, facts):
        save(self, tensors, facts)
        saves.append(facts["step"])

    monkeypatch.setattr(TrainingState, "save", saved)
    check, calls, began = interrupt.check, [], time.monotonic()
    for stop in (7, 19, 26):

        def stopping(stop=stop):
            calls.append(1)
            if len(calls) == stop:
                raise Interrupted("stopped")

        calls.clear()
        monkeypatch.setattr(interrupt, "check", stopping)
        assert lbllm("distill", "--recipe", recipe, "--only", "end-to-end").exit_code == 130
        assert (tmp_path / "run" / "distill-e2e.partial").exists()
    monkeypatch.setattr(interrupt, "check", check)
    ok("distill", "--recipe", recipe)
    # Its records say what their own steps took, and no step is in two.
    seconds = sum(record.get("seconds", 0) for record in events(tmp_path / "run" / "distill-e2e"))
    assert 0 < seconds < time.monotonic() - began
    assert saves, "no interruption came in the middle of training"
    assert hashes(tmp_path / "run" / "distill-e2e") == expected


def test_a_failure_after_the_last_step_trains_nothing_again(ok, lbllm, run, tmp_path, monkeypatch):
    recipe, steps, step = run(distill={}), [], torch.optim.AdamW.step

    def counted(self):
        steps.append(1)
        return step(self)

    def full(*_):
        raise OSError(28, "No space left on device", "loss.png")

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    with monkeypatch.context() as broken:
        broken.setattr(end_to_end_stage, "plot_steps", full)
        assert lbllm("distill", "--recipe", recipe, "--only", "end-to-end").exit_code == 1
    trained = len(steps)
    assert trained
    ok("distill", "--recipe", recipe, "--only", "end-to-end")
    assert len(steps) == trained
    left = {path.name for path in (tmp_path / "run" / "distill-e2e").iterdir()}
    assert "loss.png" in left
    assert not left & {"training.safetensors", "streams"}


def test_a_step_that_is_not_finite_leaves_the_record_of_the_others(ok, run, tmp_path, monkeypatch):
    calls, loss = [], EndToEndObjective.loss

    def sometimes(self, piece, start):
        calls.append(1)
        found = loss(self, piece, start)
        return found * float("nan") if len(calls) in (3, 4, 5) else found

    monkeypatch.setattr(EndToEndObjective, "loss", sometimes)
    monkeypatch.setattr(end_to_end, "_RECORDS", 4)
    ok("distill", "--recipe", run(distill={"batch_size": 1, "micro_batch_size": 1}), "--only", "end-to-end")
    losses = [record["loss"] for record in events(tmp_path / "run" / "distill-e2e") if "step" in record]
    assert len(losses) == 4
    assert all(loss is None or loss > 0 for loss in losses)
    assert "NaN" not in (tmp_path / "run" / "distill-e2e" / "events.jsonl").read_text()
    assert phase(tmp_path / "run" / "distill-e2e")["skipped"] == 3


def test_micro_batches_add_up_to_the_batch(made):
    settings = DistillEndToEnd(sequences=8, batch_size=4, micro_batch_size=1)
    grads = []
    for micro in (1, 4):
        student = student_of(made, "distill")
        tokens = torch.randint(1024, (8, 24), generator=torch.Generator().manual_seed(3))
        states = torch.randn(8, 24, 80, generator=torch.Generator().manual_seed(4))
        objective = EndToEndObjective(student, tokens, None, settings, None)
        for rows in torch.arange(4).split(micro):
            (objective.loss((tokens[rows], states[rows]), {}) * len(rows) / 4).backward()
        grads.append(student.blocks[0].linears["mlp.up_proj"].levels.grad)
    assert (grads[0] - grads[1]).abs().max() <= 1e-5 * grads[1].abs().max()


def test_a_student_that_is_its_teacher_is_no_division_by_zero(made, monkeypatch):
    student = student_of(made, "distill")
    tokens = torch.randint(1024, (24, 16), generator=torch.Generator().manual_seed(3))
    reporter = SimpleNamespace(note=lambda text: None, group=ALONE)
    objective = EndToEndObjective(student, tokens, None, DistillEndToEnd(sequences=24), reporter)
    monkeypatch.setattr(student, "teacher", lambda states: states)
    with torch.no_grad():
        objective.feed = lambda rows: ((tokens[row], student(tokens[row])) for row in rows)
        assert objective.held_out([0, 1], Progress(0))["error"] > 0


def test_text_is_fresh(run):
    plan = prepare(load_recipe(run(distill={"sequences": 30}, act_calib={"sequences": 20}), []), stages=TABLE)
    names = ("distill", "distill-e2e", "act-calib-e2e")
    rows = [{tuple(row) for row in plan.stage_tokens(STAGE_SPECS[name]).tolist()} for name in names]
    assert [len(found) for found in rows] == [9, 30, 20]
    assert not rows[0] & rows[1]
    assert not (rows[0] | rows[1]) & rows[2]


def test_a_phase_may_read_the_text_of_the_phase_before(run):
    """With `skip` as the phase before has it both read the same, and one folder of teacher's states serves both."""
    last = {"distill": {"sequences": 20}, "act_calib": {"sequences": 20, "skip": 9}}
    plan = prepare(load_recipe(run(**last), []), stages=TABLE)
    assert torch.equal(plan.stage_tokens(STAGE_SPECS["act-calib-e2e"]), plan.stage_tokens(STAGE_SPECS["distill-e2e"]))
    tokens = plan.stage_tokens(STAGE_SPECS["distill-e2e"])
    assert "distill.end_to_end.skip" not in stage_inputs(plan, STAGE_SPECS["distill-e2e"], tokens)


def rows_of(tokens: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in tokens.tolist()}


@pytest.mark.parametrize("source", [None, ["builtin:calibration"]])
@pytest.mark.parametrize("skip", [None, 3, 150])
def test_default_text_is_fresh(run, little_text, source, skip):
    """Also after a phase that says itself what it passes over, and where sizes are no multiple of the sources' number."""
    last = {"distill": {"sequences": 23, "skip": skip, "source": source}, "act_calib": {"sequences": 31, "source": source}}
    sets = {"source": ["builtin:calibration"], "sequences": 26, "length": 32}
    recipe = run(**last, data={"training": sets, "calibration": sets})
    plan = prepare(load_recipe(recipe, []), stages=TABLE)
    own, *others = (rows_of(plan.stage_tokens(STAGE_SPECS[stage])) for stage in ("act-calib-e2e", "distill-e2e", "distill"))
    assert len(own) == 31
    assert [len(rows) for rows in others] == [23, 26]
    assert not own & set.union(*others)
    if skip is None:
        assert not others[0] & others[1]


def test_another_source_has_its_own_text(run, little_text):
    last = {"distill": {"sequences": 24}, "act_calib": {"sequences": 24, "source": ["builtin:evaluation/novels"]}}
    sets = {"source": ["builtin:calibration"], "sequences": 24, "length": 32}
    plan = prepare(load_recipe(run(**last, data={"training": sets, "calibration": sets}), []), stages=TABLE)
    alone = plan.token_set(STAGE_SPECS["act-calib-e2e"]).model_copy(update={"sequences": 24})
    expected = training_tokens(alone, plan.tokenizer, plan.vocab, Draw(0, lambda *_: pytest.fail("sampled"), "data.training"))
    assert torch.equal(plan.stage_tokens(STAGE_SPECS["act-calib-e2e"]), expected)


@pytest.mark.parametrize(
    ("training", "phase"),
    [
        (["builtin:calibration"], ["builtin:calibration/technical"]),
        (["builtin:calibration/novels", "builtin:calibration/modern"], ["builtin:calibration/modern"]),
        (["builtin:calibration/novels"], [{"source": "builtin:calibration/novels", "weight": 2}]),
        ([{"source": "builtin:calibration/novels", "weight": 2}, "builtin:calibration/modern"], ["builtin:calibration"]),
    ],
)
def test_text_is_fresh_where_mixtures_differ(run, little_text, training, phase):
    """By text, and not by list: a part of a mixture, or one with other weights, has windows of its own too."""
    # Most of what there is: sets that were drawn one by one would meet.
    last = {"distill": {"sequences": 220, "source": phase}, "act_calib": {"sequences": 100, "source": training}}
    sets = {"source": training, "sequences": 220, "length": 128}
    plan = prepare(load_recipe(run(**last, data={"training": sets, "calibration": sets}), []), stages=TABLE)
    windows = [rows_of(plan.stage_tokens(STAGE_SPECS[stage])) for stage in ("distill", "distill-e2e", "act-calib-e2e")]
    assert [len(rows) for rows in windows] == [220, 220, 100]
    assert len(set.union(*windows)) == 540


def test_the_next_stage_goes_on_from_it(ok, run, given_tables, tmp_path):
    recipe = run(distill={})
    ok("distill", "--recipe", recipe)
    ok("act-calib", "--recipe", recipe, "--force", "act_calib.epochs=0")
    folders = [tmp_path / "run" / stage for stage in ("distill-e2e", "act-calib")]
    manifest = json.loads((folders[1] / "lbllm_stage.json").read_text())
    assert manifest["parent"]["stage"] == "distill-e2e"
    for file in (*BLOCKS, OUTER):
        before, after = (load_file(folder / file) for folder in folders)
        norms = {name for name in before if "norm" in name}
        assert norms
        assert all(torch.equal(before[name], after[name]) for name in norms)
    assert set(load_file(folders[1] / OUTER)) == {FINAL_NORM}
    # Asked for by name, the checkpoint before the phase is gone on from.
    ok("act-calib", "--recipe", recipe, "--force", "act_calib.epochs=0", "act_calib.parent=distill")
    assert not (folders[1] / OUTER).exists()


def test_the_phase_alone(ok, lbllm, run, tmp_path):
    recipe = run(distill={})
    ok("distill", "--recipe", recipe, "--only", "blocks")
    assert not (tmp_path / "run" / "distill-e2e").exists()
    assert "would write" in ok("distill", "--recipe", recipe, "--dry-run").stderr
    ok("distill", "--recipe", recipe, "--only", "end-to-end")
    assert "up to date" in ok("distill", "--recipe", recipe).stderr
    message = refused(lbllm, tmp_path / "run", "distill", "--recipe", run("other"), "--only", "end-to-end")
    assert "the recipe has no distill.end_to_end" in message
    message = refused(lbllm, tmp_path / "run", "distill", "--recipe", run("third", distill={"lr_norms": 0.5}))
    assert "distill.end_to_end.lr_norms: 0.001 -> 0.5" in message
    # Not the command that would make the blocks again as well.
    assert "replace it: lbllm distill --recipe ... --only end-to-end --force" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ["levels", "scales"]}, "distill.end_to_end: train: levels and scales: a scale moves its levels"),
        ({"train": ["weights", "scales"]}, "distill.end_to_end: train: weights and scales: where codes move"),
        ({"train": ["knees"]}, "end_to_end.train[0]: input should be 'weights', 'levels', 'scales' or 'norms', got 'knees'"),
        ({"batch_size": 24}, "distill.end_to_end.batch_size: 24 sequences in a step, but 24 sequences leave 22"),
        ({"sequences": 4000}, "(4000 beside the 9 of another set sequences x 32)"),
        ({"lr_soft": 1}, "distill.end_to_end.lr_soft: unknown key"),
        ({"source": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_what_is_refused(lbllm, run, tmp_path, settings, message):
    assert message in refused(lbllm, tmp_path / "run", "distill", "--recipe", run(distill=settings))


def test_a_manifest_that_leaves_out_the_trained_norms_is_refused(ok, lbllm, run, tmp_path):
    recipe = run(distill={"epochs": 2})
    ok("distill", "--recipe", recipe, "--only", "end-to-end")
    file = tmp_path / "run" / "distill-e2e" / "lbllm_stage.json"
    manifest = json.loads(file.read_text())
    del manifest["files"][OUTER]
    file.write_text(json.dumps(manifest))
    message = refused(lbllm, tmp_path / "run", "export", "--recipe", recipe, "export.checkpoint=distill-e2e")
    assert f"{file} is damaged (it does not name {OUTER})" in message


def test_too_little_text_is_refused_before_the_blocks_are_trained(lbllm, run, tmp_path):
    shutil.rmtree(tmp_path / "run" / "distill")
    message = refused(lbllm, tmp_path / "run", "distill", "--recipe", run(distill={"sequences": 4000}))
    assert "distill.end_to_end: " in message
