"""The last phase over the whole model: exact start, gradients, what is stored, resume, fresh text, and what is refused."""

import json
import shutil
import time
from collections import namedtuple
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from conftest import save_toy, write_recipe
from safetensors.torch import load_file
from stages import BLOCKS, block_bytes, events, hashes, refused
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

import lbllm_cli.hf  # noqa: F401 - packed folders
from lbllm_cli.core import interrupt
from lbllm_cli.core.errors import Interrupted
from lbllm_cli.core.lock import locked
from lbllm_cli.data.tokens import Draw, training_tokens
from lbllm_cli.end_to_end import stage as end_to_end_stage
from lbllm_cli.end_to_end import teacher as teacher_states
from lbllm_cli.end_to_end import trainer as end_to_end
from lbllm_cli.end_to_end.loss import distillation_loss
from lbllm_cli.end_to_end.student import WholeStudent
from lbllm_cli.end_to_end.trainer import EndToEndObjective
from lbllm_cli.models.model import FINAL_NORM, open_model
from lbllm_cli.pipeline import streams
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.lineage import stage_inputs
from lbllm_cli.pipeline.plan import prepare
from lbllm_cli.pipeline.stage_record import OUTER
from lbllm_cli.pipeline.training_state import TrainingState
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.schema import Model
from lbllm_cli.recipe.stages import STAGES as STAGE_SPECS
from lbllm_cli.recipe.stages import TABLE
from lbllm_cli.recipe.training import ActEndToEnd, DistillEndToEnd
from lbllm_cli.training.block_linears import BlockLinears
from lbllm_cli.training.forecast import KEPT_DEPLOYED, KEPT_SOFT
from lbllm_cli.training.knees import Shape
from lbllm_cli.training.progress import Progress

PHASE = {"sequences": 24, "epochs": 1, "batch_size": 2}
STAGES = ("ptq", "distill", "act-calib")
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def made(finished) -> tuple[Path, Path]:
    """Toy model and an output folder that holds its finished ptq, distill and act-calib stages."""
    return finished(*STAGES)


@pytest.fixture
def run(made, tmp_path):
    """run(distill=..., act_calib=...): a recipe with these end-to-end phases, in a folder that holds the stages before."""
    toy, output = made
    for stage in STAGES:
        shutil.copytree(output / stage, tmp_path / "run" / stage)

    def recipe(name: str = "r", distill: dict | None = None, act_calib: dict | None = None, **sections) -> Path:
        phases = {
            "distill": {"epochs": 1} | ({"end_to_end": {**PHASE, **distill}} if distill is not None else {}),
            "act_calib": {"epochs": 1} | ({"end_to_end": {**PHASE, **act_calib}} if act_calib is not None else {}),
        }
        return write_recipe(tmp_path / f"{name}.yaml", toy, tmp_path / "run", **phases, **sections)

    return recipe


def phase(folder: Path) -> dict:
    """What is recorded of the phase as a whole."""
    return next(record for record in events(folder) if "phase" in record)


def student_of(made, stage: str, **settings) -> WholeStudent:
    toy, output = made
    kind = ActEndToEnd if stage == "act-calib" else DistillEndToEnd
    return WholeStudent(open_model(Model(path=str(toy)), CPU), Checkpoint(output, stage), kind(**PHASE, **settings))


@pytest.mark.parametrize("stage", ["distill", "act-calib"])
def test_no_epochs_return_the_parent_byte_for_byte(ok, run, tmp_path, stage):
    ok(stage, "--recipe", run(**{stage.replace("-", "_"): {"epochs": 0}}))
    made, parent = tmp_path / "run" / f"{stage}-e2e", tmp_path / "run" / stage
    assert block_bytes(made) == block_bytes(parent)
    assert not (made / OUTER).exists()
    manifest, before = (json.loads((folder / "lbllm_stage.json").read_text()) for folder in (made, parent))
    assert manifest["parent"] == {"stage": stage, "fingerprint": before["fingerprint"]}
    assert manifest["tokens"] == 24 * 32
    assert manifest.get("activations") == before.get("activations")


@pytest.mark.parametrize("name", ["llama-untied", "qwen2-biases", "qwen3"])
@torch.no_grad()
def test_a_student_computes_what_its_export_does(ok, in_torch, finished, tmp_path, name):
    toy, output = finished(*STAGES, family=name)
    run = Path(shutil.copytree(output, tmp_path / "run"))
    for stage in ("distill", "act-calib"):
        ok("export", "--recipe", output.parent / "r.yaml", f"output.dir={run}", f"export.checkpoint={stage}", "--force")
        exported = AutoModelForCausalLM.from_pretrained(run / "export").eval()
        student = student_of((toy, output), stage)
        tokens = torch.randint(1024, (2, 40), generator=torch.Generator().manual_seed(3))
        found, expected = linear(student(tokens), student.head), exported(tokens, use_cache=False).logits
        # Not bit for bit: attention takes another path with a mask that is not there. Measured 3e-6 of the largest.
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_gradients_are_those_of_the_whole_model_in_memory(ok, made, run, tmp_path):
    """Against autograd through a dense model: the gradient of a level is the sum over its weights."""
    toy, _ = made
    student = student_of(made, "distill")
    tokens = torch.randint(1024, (2, 24), generator=torch.Generator().manual_seed(3))
    teacher = AutoModelForCausalLM.from_pretrained(toy).eval()
    ok("export", "--recipe", run(), "export.checkpoint=distill", "export.format=dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export").eval()
    for model in (teacher, dense):
        model.requires_grad_(True)
    with torch.no_grad():
        aim = torch.log_softmax(teacher(tokens).logits[:, :-1], -1)
        states = teacher.model(tokens).last_hidden_state[:, :-1].flatten(0, 1)
    found = torch.log_softmax(dense(tokens).logits[:, :-1], -1)
    loss = (aim.exp() * (aim - found)).sum(-1).mean()
    loss.backward()
    mine = distillation_loss(student(tokens)[:, :-1].flatten(0, 1), states, student.head, tokens[:, 1:].flatten(), 1.0, 0.0)
    mine.backward()
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    for index, block in enumerate(student.blocks):
        layer = dense.model.layers[index]
        for name, part in block.linears.items():
            codes = torch.tensor(
                [[(byte >> shift) & 3 for byte in row for shift in (0, 2, 4, 6)] for row in part.codes.flatten(1).tolist()]
            )
            grad = layer.get_submodule(name).weight.grad
            expected = torch.zeros_like(part.levels)
            for column in range(grad.shape[1]):
                rows = torch.arange(len(grad))
                expected[rows, column // 32, codes[:, column]] += grad[:, column]
            assert (part.levels.grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name
        for name, norm in block.norms.items():
            expected = layer.get_submodule(name).weight.grad
            assert (norm.weight.grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name
    expected = dense.model.norm.weight.grad
    assert (student.norm.weight.grad - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("stage", ["distill", "act-calib"])
def test_training_lowers_the_divergence_and_what_is_stored_is_what_is_measured(ok, run, tmp_path, stage, in_torch):
    recipe = run(**{stage.replace("-", "_"): {"sequences": 80, "lr_levels": 0.01, "lr_norms": 0.005}})
    ok(stage, "--recipe", recipe)
    facts = phase(tmp_path / "run" / f"{stage}-e2e")
    assert facts["best_epoch"] == 1
    assert facts["after"]["kl"] < 0.96 * facts["before"]["kl"]  # measured 0.89 and 0.93
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


def test_quantizers_are_trained_with_knees(ok, run, tmp_path):
    ok("act-calib", "--recipe", run(act_calib={"train": ["clip_factors", "knees"], "sequences": 64, "lr_clip_factors": 0.02}))
    assert phase(tmp_path / "run" / "act-calib-e2e")["best_epoch"] == 1
    before, after = (
        {} | {n: t for f in BLOCKS for n, t in load_file(tmp_path / "run" / stage / f).items()}
        for stage in ("act-calib", "act-calib-e2e")
    )
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert {"act_clip"} <= changed <= {"act_clip", "act_levels", "act_zero"}


def test_a_resumed_run_equals_an_uninterrupted_one(ok, lbllm, run, tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "_RECORDS", 4)
    recipe = run(distill={"epochs": 2})
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


@pytest.mark.parametrize("stage", ["distill", "act-calib"])
def test_recomputation_changes_nothing(ok, run, tmp_path, stage):
    found = []
    settings = {"sequences": 24, "lr_levels": 0.01}
    for recompute in ("always", "never"):
        recipe = run(**{stage.replace("-", "_"): {**settings, "recompute": recompute}})
        ok(stage, "--recipe", recipe, "--only", "end-to-end", "--force")
        losses = [record["loss"] for record in events(tmp_path / "run" / f"{stage}-e2e") if "step" in record]
        found.append((losses, block_bytes(tmp_path / "run" / f"{stage}-e2e")))
    assert found[0] == found[1]
    assert len(set(found[0][0])) == 11
    assert "up to date" in ok(stage, "--recipe", run(**{stage.replace("-", "_"): settings})).stderr


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


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_norms_that_are_not_trained_stay_to_the_bit(ok, tmp_path, stored):
    """Whatever the compute dtype: rounding a source's float32 norms to it would change the model."""
    toy = save_toy(tmp_path / "model", dtype=stored)
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", distill={"epochs": 0})
    for command in ("ptq", "distill"):
        ok(command, "--recipe", recipe, "model.dtype=bfloat16")
    source = load_file(toy / "model.safetensors")
    parent = Checkpoint(tmp_path / "run", "distill")
    model = open_model(Model(path=str(toy), dtype="bfloat16"), CPU)
    for name, tensor in WholeStudent(model, parent, DistillEndToEnd(train=["levels"])).snapshot().items():
        if "norm" in name:
            assert tensor.dtype == stored
            assert torch.equal(tensor, source[name]), name


def test_a_student_that_is_its_teacher_is_no_division_by_zero(made, monkeypatch):
    student = student_of(made, "distill")
    tokens = torch.randint(1024, (24, 16), generator=torch.Generator().manual_seed(3))
    reporter = SimpleNamespace(note=lambda text: None)
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


@pytest.mark.parametrize(("knees", "tensors"), [([], KEPT_DEPLOYED), (["knees"], KEPT_SOFT)])
def test_forecast_covers_what_quantizing_keeps(made, knees, tensors):
    student = student_of(made, "act-calib", train=["clip_factors", *knees])
    quantizer = next(iter(student.blocks[0].quantizers.values()))
    quantizer.temperature = 0.5
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = torch.randn(512, quantizer.size * 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = quantizer.values(inputs)
    found = sum(kept.values()) / inputs.nbytes
    assert output.shape == inputs.shape
    assert 0.8 * tensors < found < 1.05 * tensors


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
def test_default_text_is_fresh(run, source, skip):
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


def test_another_source_has_its_own_text(run):
    last = {"distill": {"sequences": 24}, "act_calib": {"sequences": 24, "source": ["builtin:calibration/novels"]}}
    sets = {"source": ["builtin:calibration"], "sequences": 24, "length": 32}
    plan = prepare(load_recipe(run(**last, data={"training": sets, "calibration": sets}), []), stages=TABLE)
    alone = plan.token_set(STAGE_SPECS["act-calib-e2e"]).model_copy(update={"sequences": 24})
    expected = training_tokens(alone, plan.tokenizer, plan.vocab, Draw(0, lambda *_: pytest.fail("sampled"), "data.training"))
    assert torch.equal(plan.stage_tokens(STAGE_SPECS["act-calib-e2e"]), expected)


def test_blocks_run_with_the_norms_of_their_parent(made):
    """act-calib after an end-to-end phase: the student's norms are the trained ones, the teacher's stay the source's."""
    toy, output = made
    teacher = open_model(Model(path=str(toy)), CPU).block(0)
    stored = Checkpoint(output, "distill").read_block(0)
    norms = {f"{teacher.prefix}{name}": p.detach().clone() for name, p in teacher.layer.named_parameters() if "norm" in name}
    assert len(norms) == 2
    start = stored | {name: 2 * weight for name, weight in norms.items()}
    student = BlockLinears(teacher, start, {}, ())
    for name, weight in norms.items():
        inside = name.removeprefix(teacher.prefix)
        assert torch.equal(student.block.layer.get_parameter(inside), 2 * weight)
        assert torch.equal(teacher.layer.get_parameter(inside), weight)
        assert torch.equal(student.packed()[name], start[name])


def test_the_next_stage_goes_on_from_it(ok, run, tmp_path):
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


def test_validate_forecasts_the_phases_that_the_recipe_has(ok, run):
    found = [json.loads(ok("validate", "--recipe", recipe, "--json").stdout) for recipe in (run(), run("both", {}, {}))]
    stages = [set(facts["forecast_bytes"]) for facts in found]
    assert stages[1] - stages[0] == {"distill-e2e", "act-calib-e2e"}
    need = found[1]["forecast_bytes"]
    assert need["act-calib-e2e"]["device"] > need["distill-e2e"]["device"]
    # The teacher's last hidden states, float32.
    states = 24 * 32 * 80 * 4
    assert need["distill-e2e"]["streams"] == states
    elsewhere = json.loads(ok("validate", "--recipe", run("kept", {"teacher": "kept"}), "--json").stdout)["forecast_bytes"]
    assert need["distill-e2e"]["teacher"] == 0
    # While the teacher runs, a block's inputs lie beside its outputs.
    assert elsewhere["distill-e2e"]["teacher"] == 2 * states
    assert elsewhere["distill-e2e"]["disk"] <= need["distill-e2e"]["disk"] - states


@pytest.fixture
def other_disk(tmp_path):
    """A folder on another disk than the run's."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one disk only")
    with TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_disk_of_the_teacher_s_folder(ok, lbllm, run, tmp_path, other_disk, monkeypatch):
    """The states are asked for where they are to lie, and not again once they do."""
    kept, usage = other_disk / "kept", namedtuple("usage", "total used free")
    free = {True: 10**5, False: 10**9}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**10, 0, free[other_disk in (folder, *folder.parents)]))
    kept.mkdir()
    command = ("distill", "--recipe", run(distill={"teacher": str(kept)}), "--only", "end-to-end")
    message = refused(lbllm, tmp_path / "run", *command)
    assert f"GiB of disk in {kept}" in message
    assert "choose another end_to_end.teacher" in message
    free[True] = 10**6
    ok(*command)
    free[True] = 0
    ok(*command, "--force")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ["levels", "scales"]}, "distill.end_to_end: train: levels and scales: a scale moves its levels"),
        ({"train": ["knees"]}, "distill.end_to_end.train[0]: input should be 'levels', 'scales' or 'norms', got 'knees'"),
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


class TestTeacher:
    """The folder that keeps the teacher's last hidden states."""

    def test_it_is_used_again(self, ok, run, tmp_path):
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

    def test_states_are_the_whole_model_s(self, ok, made, run, tmp_path):
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
    def test_an_interrupted_pass_goes_on_after_its_last_block(self, ok, lbllm, run, tmp_path, monkeypatch, other_text):
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
    def test_another_s_is_refused(self, ok, lbllm, run, tmp_path, change, message):
        folder = tmp_path / "teacher"
        ok("distill", "--recipe", run(distill={"teacher": str(folder), "epochs": 0}))
        if change:
            change(folder)
        other = run("other", distill={"teacher": str(folder), "sequences": 24 if change else 25})
        message_found = refused(lbllm, tmp_path / "run", "distill", "--recipe", other, "--only", "end-to-end", "--force")
        assert message in message_found

    def test_one_process_writes_it(self, lbllm, run, tmp_path):
        folder = tmp_path / "teacher"
        with locked(folder, "another"):
            result = lbllm("distill", "--recipe", run(distill={"teacher": str(folder)}))
        assert result.exit_code == 2
        assert f"end_to_end.teacher {folder} is in use by process" in result.stderr

    def test_of_another_model(self, ok, lbllm, run, tmp_path):
        folder = tmp_path / "teacher"
        ok("distill", "--recipe", run(distill={"teacher": str(folder), "epochs": 0}))
        record = json.loads((folder / "lbllm_teacher.json").read_text())
        (folder / "lbllm_teacher.json").write_text(json.dumps({**record, "model.files": "other"}))
        recipe = run(distill={"teacher": str(folder), "epochs": 0})
        found = refused(lbllm, tmp_path / "run", "distill", "--recipe", recipe, "--only", "end-to-end", "--force")
        assert "model.files: other -> " in found


def test_shapes_are_found_again_in_their_levels():
    generator = torch.Generator().manual_seed(0)
    tried = 0
    for _ in range(2000):
        fine_low, fine_high, coarse_low, coarse_high = torch.randint(0, 6, (4,), generator=generator).tolist()
        ratios = torch.randint(2, 8, (2,), generator=generator).tolist()
        # Of a side without coarse levels no ratio is left to be seen.
        shape = Shape(
            fine_low, fine_high, coarse_low, coarse_high, ratios[0] if coarse_low else 1, ratios[1] if coarse_high else 1
        )
        if shape.valid():
            assert Shape.of(shape.levels(), shape.zero) == shape
            tried += 1
    assert tried > 1000
