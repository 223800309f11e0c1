"""The end-to-end phase in the pipeline."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lbllm_cli.core.splits import held_out_rows
from lbllm_cli.end_to_end.forecast import end_to_end_need, recomputes
from lbllm_cli.end_to_end.student import WholeStudent
from lbllm_cli.end_to_end.teacher import check_states, own_folder, teacher_folder, teacher_states
from lbllm_cli.end_to_end.trainer import EndToEndObjective
from lbllm_cli.models.block import block_prefix
from lbllm_cli.models.model import FINAL_NORM
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.duration import BlockShape, Part, steps
from lbllm_cli.pipeline.forecast import Need
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.traffic import Exchanged
from lbllm_cli.pipeline.training_state import TrainingState
from lbllm_cli.pipeline.work import StageRun, parents_activations
from lbllm_cli.recipe.stages import StageSpec
from lbllm_cli.recipe.training import EndToEnd
from lbllm_cli.training.duration import LATENT_BYTES
from lbllm_cli.training.forecast import owned_share
from lbllm_cli.training.loop import Job, TrainingLoop
from lbllm_cli.training.master import LEVELS, SCALES
from lbllm_cli.training.plots import plot_steps
from lbllm_cli.training.traffic import whole_exchanged

activations = parents_activations


def check(plan: Plan) -> None:
    """What a phase reads is checked before the blocks of its command are trained."""


def need(plan: Plan, spec: StageSpec, tokens: Tensor | None) -> Need:
    """Need of a phase; the teacher's states, where they are kept already, need no room."""
    settings, world = plan.recipe.end_to_end[spec], plan.world
    found = end_to_end_need(plan.recipe, plan.model, settings, recomputes(plan.recipe, plan.model, settings, world), world)
    folder = teacher_folder(settings)
    kept = False
    if folder is not None and tokens is not None:
        own = tokens[plan.group.share(len(tokens)).slice]
        kept = check_states(own_folder(folder, plan.group), plan.model, own)
    return replace(found, stage=spec.name, teacher_folder=folder, teacher=0.0 if kept else found.teacher)


def work(plan: Plan, spec: StageSpec) -> list[Part]:
    """Steps of the whole model, and the teacher's pass before them."""
    model, settings, blocks = plan.model, plan.recipe.end_to_end[spec], plan.model.blocks
    length = plan.recipe.data.training.length
    shape, held = BlockShape.of(model, length), held_out_rows(settings.sequences, settings.held_out)
    most = plan.world.most
    every, again = float(most(settings.sequences) * length), recomputes(plan.recipe, model, settings, plan.world)
    rows = most(settings.sequences - held) * settings.epochs
    trained, looked = float(rows * length), float(most(held) * length * (settings.epochs + 1))
    # Both distributions and the gradient.
    head = 6.0 * model.config.vocab_size * shape.hidden * trained
    if "weights" in settings.trained:
        moved = float(steps(settings.sequences, held, settings.batch_size, settings.epochs) * LATENT_BYTES) * shape.weights
        moved *= owned_share(model, settings.trained, plan.world, blocks)
    else:
        # Weights are decoded, once more where blocks are computed again, and gradients of them are summed up.
        moved = rows / min(settings.micro_batch_size, most(settings.batch_size)) * (3 + again) * 2.3 * shape.weights
    training = Part(
        "training steps", f"{spec.section}.sequences",
        blocks * ((3 + again) * shape.forward(trained) + shape.forward(looked)) + head,
        passed=blocks * (moved + shape.passes(trained, 1 + again / 3)), read=shape.states(trained),
    )  # fmt: skip
    teaching = Part(
        "the teacher's pass", f"{spec.section}.sequences", blocks * shape.forward(every),
        passed=blocks * shape.passes(every, 1 / 3), read=blocks * shape.states(every),
        written=blocks * shape.states(every),
    )  # fmt: skip
    return [training, teaching]


def exchanged(plan: Plan, spec: StageSpec) -> Exchanged:
    """Gradients and weights of all blocks."""
    return whole_exchanged(plan, plan.recipe.end_to_end[spec])


def run(run: StageRun) -> None:
    """Has the teacher go ahead, trains, and writes all blocks."""
    plan, parent, writer, reporter = run.plan, run.parent, run.writer, run.reporter
    assert parent is not None
    settings, model = plan.recipe.end_to_end[run.spec], plan.model
    reporter.total(0)
    share = plan.group.share(len(run.tokens))
    tokens = run.tokens[share.slice]
    folder = own_folder(teacher_folder(settings) or writer.path / "streams", plan.group)
    states = teacher_states(folder, model, tokens, plan.recipe.runtime.batch_size, reporter)
    student = WholeStudent(model, parent, settings, recomputes(plan.recipe, model, settings, plan.world), plan.group)
    seed, length = plan.recipe.runtime.seed, tokens.shape[1]
    job = Job(0, "the whole model", run.spec.section, share, length, seed, model.device, plan.group)
    keeper = TrainingState(writer.path, plan.recipe.runtime.save_minutes, plan.group)
    loop = TrainingLoop(EndToEndObjective(student, tokens, states, settings, reporter), settings, job, keeper, reporter)
    with torch.enable_grad():
        changed = loop.run() or {}
    # A run that is killed while the blocks are written does not train again.
    loop.save()
    facts = loop.facts()
    if facts["epochs"] and not facts["best_epoch"]:
        reporter.note(_not_better(run.spec, settings, facts, parent))
    _write(run, parent, changed)
    # The teacher's pass, held-out text, blocks that are written.
    reporter.record({"phase": run.spec.phase, "seconds": round(reporter.besides_steps(), 3), **facts})
    if plan.group.first:
        plot_steps(writer.path / "events.jsonl", writer.path / "loss.png")


def _not_better(spec: StageSpec, settings: EndToEnd, facts: dict[str, Any], parent: Checkpoint) -> str:
    """What to say where the phase ends with what it began with. facts: of the training."""
    losses = [epoch["held_out"]["error"] for epoch in facts["epochs"]]
    rates = dict.fromkeys(f"{spec.section}.lr_{LEVELS if kind == SCALES else kind}" for kind in settings.trained)
    return (
        f"no epoch was better: held-out loss {facts['before']['error']:.4f} at the start, {min(losses):.4f} after epoch "
        f"{losses.index(min(losses)) + 1}; the checkpoint is that of {parent.stage}; lower {', '.join(rates)}"
    )


def _write(run: StageRun, parent: Checkpoint, changed: dict[str, Tensor]) -> None:
    """All blocks, the parent's own tensors where training has not changed them."""
    for index in range(run.plan.model.blocks):
        own = {name: tensor for name, tensor in changed.items() if name.startswith(block_prefix(index))}
        run.writer.write_block(index, {**parent.read_block(index), **own})
        run.writer.commit(index)
    outer = parent.read_outer() | {name: changed[name] for name in (FINAL_NORM,) if name in changed}
    if outer:
        run.writer.write_outer(outer)
