"""`lbllm export`."""

import torch

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.console import say
from lbllm_cli.core.lock import locked
from lbllm_cli.export import writer
from lbllm_cli.export.forecast import export_need
from lbllm_cli.export.formats import exporter
from lbllm_cli.pipeline.checkpoint import complete_stages
from lbllm_cli.pipeline.forecast import announce
from lbllm_cli.pipeline.lineage import open_checkpoint
from lbllm_cli.pipeline.plan import prepare
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import EXPORT, TABLE


@torch.no_grad()
def export(recipe: Recipe, dry_run: bool, force: bool) -> None:
    """`lbllm export`."""
    plan = prepare(recipe)
    stage: str = recipe.export.checkpoint
    if stage == "latest":
        complete = complete_stages(plan.output)
        stage = complete[-1] if complete else TABLE[0].name
    by = exporter(recipe.export.format)
    checkpoint = open_checkpoint(plan, stage)
    by.check(plan.model, checkpoint.record.group_size)
    target = plan.output / EXPORT
    form, shard = recipe.export.format, int(recipe.export.shard_gb * 1e9)
    done = not force and writer.up_to_date(target, writer.export_inputs(checkpoint, form, shard))
    if not done:
        writer.check_target(target)
    announce(export_need(recipe, plan.model), plan.output, plan.model, done=done)
    if dry_run:
        say(f"export: would write {target}, {recipe.export.format}, from {checkpoint.path}")
        return
    with locked(plan.output), interrupt.graceful():
        if done:
            files.touch(target / writer.RECORD)
            say(f"export: up to date, {target}")
            return
        writer.export(plan.model, checkpoint, target, form, shard, recipe.model.path)
    without = "; quantizers of activations are left out" if checkpoint.activations and not by.quantizes else ""
    say(f"export: {by.fidelity(plan.model)}{without}")
    size = sum(file.stat().st_size for pattern in writer.WEIGHTS for file in target.glob(pattern))
    say(f"export: {target}, {recipe.export.format}, {size:,} bytes of weights")
