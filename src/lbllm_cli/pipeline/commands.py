"""What each command does with a recipe: prepare, say what it needs, run the stage, say what it used."""

import io
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from lbllm_cli.act_calib.fit import MIN_TOKENS, activation_format
from lbllm_cli.act_calib.fit import fit_block as fit_act_calib
from lbllm_cli.core import files, interrupt
from lbllm_cli.core.errors import UsageError
from lbllm_cli.distill.fit import fit_block as fit_distill
from lbllm_cli.end_to_end.teacher import check_states, teacher_folder
from lbllm_cli.export import writer as exporting
from lbllm_cli.models.model import choose_device
from lbllm_cli.pipeline import forecast
from lbllm_cli.pipeline import plan as prepare
from lbllm_cli.pipeline.checkpoint import Checkpoint, changes, check_stage, command_of, complete_stages, locked, remake
from lbllm_cli.pipeline.forecast import Need
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.reporter import console
from lbllm_cli.pipeline.runner import Stage, Work, by_blocks, end_to_end, run_stage
from lbllm_cli.pipeline.stage_record import PARENT
from lbllm_cli.ptq.fit import fit_block as fit_ptq
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.training import ActEndToEnd, DistillEndToEnd, EndToEnd
from lbllm_cli.runtime.quantizer import ActivationFormat
from lbllm_cli.training import forecast as forecast_training

Last = DistillEndToEnd | ActEndToEnd


def say(text: str) -> None:
    """One line on stderr."""
    console().print(text, markup=False)


def announce(need: Need, plan: Plan, teacher: Path | None = None, done: bool = False) -> None:
    """The forecast, after what it rules out has been refused. teacher: see `check_disk`. done: nothing is left to be written."""
    model = plan.model
    if not done:
        forecast.check_disk(need, plan.output, teacher)
    say(f"{need.stage}: {need.line()}, on {model.device} in {str(model.dtype).removeprefix('torch.')}")
    for warning in forecast.memory_warnings(need, model.device):
        say(f"{need.stage}: warning: {warning}")


# The two phases of a stage that trains.
Phase = Literal["blocks", "end-to-end"]


@torch.no_grad()
def ptq(recipe: Recipe, dry_run: bool, force: bool) -> None:
    """`lbllm ptq`."""
    plan = prepare.prepare(recipe, calibrate=True)
    need = forecast.ptq_need(recipe, plan.model)
    _run(plan, need, by_blocks(lambda _: partial(fit_ptq, settings=recipe.ptq)), dry_run, force)


@torch.no_grad()
def distill(recipe: Recipe, dry_run: bool, force: bool, only: Phase | None = None) -> None:
    """`lbllm distill`. only: one of its phases; default those that the recipe has."""
    plan = prepare.prepare(recipe, calibrate=True, train=True)
    last = _last_phase(plan, recipe.distill.end_to_end, "distill-e2e", only)
    if only != "end-to-end":
        fit = partial(fit_distill, settings=recipe.distill, seed=recipe.runtime.seed)
        work = by_blocks(lambda reporter: partial(fit, monitor=reporter))
        _run(plan, forecast_training.distill_need(recipe, plan.model), work, dry_run, force, "ptq")
    if last is not None:
        _run_last(plan, last, "distill-e2e", dry_run, force)


@torch.no_grad()
def act_calib(recipe: Recipe, dry_run: bool, force: bool, only: Phase | None = None) -> None:
    """`lbllm act-calib`. only: one of its phases; default those that the recipe has."""
    plan = prepare.prepare(recipe, calibrate=True, train=True)
    last = _last_phase(plan, recipe.act_calib.end_to_end, "act-calib-e2e", only)
    if only != "end-to-end":
        tokens = (recipe.act_calib.sequences or recipe.data.training.sequences) * recipe.data.training.length
        if tokens < MIN_TOKENS:
            raise UsageError(
                f"data.training, act_calib.sequences: {tokens} tokens, act-calib fits its quantizers on at least {MIN_TOKENS}; "
                "raise sequences or length"
            )
        layout = activation_format(recipe.act_calib, recipe.ptq.group_size)
        fit = partial(fit_act_calib, settings=recipe.act_calib, layout=layout, seed=recipe.runtime.seed)
        work = by_blocks(lambda reporter: partial(fit, monitor=reporter), layout)
        need = forecast_training.act_calib_need(recipe, plan.model)
        _run(plan, need, work, dry_run, force, plan.activation_parent(), layout)
    if last is not None:
        _run_last(plan, last, "act-calib-e2e", dry_run, force)


def _last_phase(plan: Plan, settings: Last | None, stage: str, only: Phase | None) -> Last | None:
    """Settings of the end-to-end phase where it is to run. Its text is read now: too little is not found after all blocks."""
    if only == "end-to-end" and settings is None:
        raise UsageError(f"--only end-to-end: the recipe has no {prepare.DATA[stage]}; add it, for example sequences: 128")
    if only == "blocks" or settings is None:
        return None
    if not plan.generates(stage):
        plan.stage_tokens(stage)
    return settings


def _run_last(plan: Plan, settings: EndToEnd, stage: str, dry_run: bool, force: bool) -> None:
    before = command_of(stage)
    if dry_run and before not in complete_stages(plan.output):
        say(f"{stage}: would go on from {before}, which is not there yet")
        return
    need = forecast_training.end_to_end_need(plan.recipe, plan.model, settings, stage)
    _run(plan, need, end_to_end(settings), dry_run, force, before)


def _run(
    plan: Plan,
    need: Need,
    work: Work,
    dry_run: bool,
    force: bool,
    before: str | None = None,
    activations: ActivationFormat | None = None,
) -> None:
    """Reads the text of a stage, says what it needs, and runs it; see `pipeline.run_stage`. before: the stage it goes on from."""
    stage = need.stage
    check_stage(plan.output, stage, force)
    parent = None if before is None else _parent(plan, before)
    sampled = plan.generates(stage)
    tokens = None if sampled else plan.stage_tokens(stage)
    layout = activations.as_dict() if activations else None if parent is None else parent.manifest.get("activations")
    teacher = teacher_folder(plan.settings(stage))
    if teacher is not None and tokens is not None and check_states(teacher, plan.model, tokens):
        need = replace(need, teacher=0.0)
    announce(need, plan, teacher, done=stage in complete_stages(plan.output) and not force)
    if sampled:
        say(f"{stage}: {prepare.DATA[stage]} text is sampled from the model, which is whole in memory meanwhile")
    if dry_run:
        say(f"{stage}: would write {plan.output / stage}" + (f", from {parent.path}" if parent else ""))
        return
    with locked(plan.output), interrupt.graceful():
        tokens = plan.stage_tokens(stage) if tokens is None else tokens
        run_stage(Stage(plan, need, tokens, plan.inputs(stage, tokens, parent), parent, layout), force, work)


def _parent(plan: Plan, stage: str) -> Checkpoint:
    """The checkpoint to go on from; refuses one that this recipe would make differently, or one of those before it.

    Text that the model would have to write anew is not compared.
    """
    parent = open_checkpoint(plan, stage)
    for checkpoint in (*reversed(ancestors(plan.output, parent)), parent):
        made, sampled = checkpoint.stage, plan.generates(checkpoint.stage)
        wanted = plan.inputs(made, None if sampled else plan.stage_tokens(made))
        left_out = {PARENT, *([f"{prepare.DATA[made]}.tokens"] if sampled else [])}
        made_from = {name: value for name, value in checkpoint.inputs.items() if name not in left_out}
        if changed := changes(made_from, wanted):
            raise UsageError(
                f"{checkpoint.path} was made from other inputs than this recipe's:\n{changed}\n"
                f"Set these keys back, or run: {remake(checkpoint.stage)}"
            )
    if parent.record.group_size != plan.recipe.ptq.group_size:
        raise UsageError(
            f"{parent.path} has group size {parent.record.group_size}, ptq.group_size is {plan.recipe.ptq.group_size}; "
            "set it back, or use another output.dir"
        )
    return parent


def ancestors(output: Path, checkpoint: Checkpoint) -> list[Checkpoint]:
    """The checkpoints that one was made from, nearest first, as far as they are there.

    Raises UsageError where one of them is another than the one that the next was made from.
    """
    found: list[Checkpoint] = []
    while (parent := checkpoint.record.parent) is not None and parent.stage in complete_stages(output):
        present = Checkpoint(output, parent.stage)
        if present.content != checkpoint.inputs[PARENT]:
            raise UsageError(
                f"{checkpoint.path} was made from another {parent.stage} checkpoint than the one in {present.path}; "
                f"run: {remake(checkpoint.stage)}"
            )
        found.append(present)
        checkpoint = present
    return found


def open_checkpoint(plan: Plan, stage: str) -> Checkpoint:
    """A complete stage that is unchanged and belongs to this model and to the stages before it; refuses any other by name."""
    checkpoint = Checkpoint(plan.output, stage)
    made_from, now = checkpoint.inputs.get("model.files"), plan.model.identity()
    if made_from != now:
        raise UsageError(
            f"{checkpoint.path} was made from another model (expected {now[:12]}, got {str(made_from)[:12]}); "
            "set model.path to the model it was made from, or use another output.dir"
        )
    if checkpoint.record.blocks != plan.model.blocks:
        raise UsageError(
            f"{checkpoint.path} has {checkpoint.record.blocks} blocks, the model {plan.model.blocks}; run: {remake(stage)}"
        )
    ancestors(plan.output, checkpoint)
    checkpoint.verify()
    return checkpoint


@torch.no_grad()
def export(recipe: Recipe, dry_run: bool, force: bool) -> None:
    """`lbllm export`."""
    plan = prepare.prepare(recipe)
    stage: str = recipe.export.checkpoint
    if stage == "latest":
        complete = complete_stages(plan.output)
        stage = complete[-1] if complete else "ptq"
    checkpoint = open_checkpoint(plan, stage)
    target = plan.output / exporting.EXPORT
    dense, shard = recipe.export.format == "dense", int(recipe.export.shard_gb * 1e9)
    done = not force and exporting.up_to_date(target, exporting.export_inputs(checkpoint, dense, shard))
    if not done:
        exporting.check_target(target)
    announce(forecast.export_need(recipe, plan.model), plan, done=done)
    if dry_run:
        say(f"export: would write {target}, {recipe.export.format}, from {checkpoint.path}")
        return
    with locked(plan.output), interrupt.graceful():
        if done:
            files.touch(target / exporting.RECORD)
            say(f"export: up to date, {target}")
            return
        exporting.export(plan.model, checkpoint, target, dense, shard)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    say(f"export: {target}, {recipe.export.format}, {size:,} bytes of weights")


@torch.no_grad()
def generate(
    model: str,
    prompt: str,
    raw: bool,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
    device: str,
    full_activations: bool,
    trust_remote_code: bool,
) -> None:
    """`lbllm generate`."""
    from lbllm_cli.models.folder import resolve
    from lbllm_cli.models.sampling import stream_text

    if math.isnan(temperature):
        raise UsageError("--temperature nan: expected a number from 0 to 2")
    chosen = choose_device(device, "--device")
    folder = resolve(model, None, weights=True, key="--model")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not have every character that a model writes
    speed: list[str] = []
    for piece in stream_text(
        folder, prompt, raw, max_new_tokens, temperature, seed, chosen, full_activations, speed.append, trust_remote_code
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    say(f"generate: {speed[0]}, {torch.get_num_threads()} threads")
