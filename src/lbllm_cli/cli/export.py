"""`lbllm export`."""

from pathlib import Path

import torch

from lbllm_cli import __version__
from lbllm_cli.cli.push import check_push, push
from lbllm_cli.core import files, interrupt
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.lock import locked
from lbllm_cli.evaluation.records import read_results
from lbllm_cli.export import writer
from lbllm_cli.export.base import Form
from lbllm_cli.export.card import Described
from lbllm_cli.export.forecast import export_need
from lbllm_cli.export.formats import exporter
from lbllm_cli.pipeline.checkpoint import Checkpoint, complete_stages
from lbllm_cli.pipeline.forecast import announce
from lbllm_cli.pipeline.lineage import open_checkpoint
from lbllm_cli.pipeline.other_keys import other_keys
from lbllm_cli.pipeline.plan import prepare
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import BASE, EXPORT, TABLE


@torch.no_grad()
def export(recipe: Recipe, repository: str | None, private: bool, dry_run: bool, force: bool) -> None:
    """`lbllm export`. repository: of the Hub, that it is to be uploaded to."""
    if repository is not None:
        check_push(repository)
    elif private:
        raise UsageError("--private says how --push makes a repository; give --push ORG/NAME too")
    plan = prepare(recipe)
    stage: str = recipe.export.checkpoint
    if stage == "latest":
        complete = complete_stages(plan.output)
        stage = complete[-1] if complete else TABLE[0].name
    by = exporter(recipe.export.format)
    checkpoint = open_checkpoint(plan, stage)
    if warning := other_keys(plan, [checkpoint]):
        say(f"export: warning: {warning}")
    by.check(plan.model, checkpoint.record.scale_group)
    target = plan.output / EXPORT
    form = Form.of(recipe)
    done = not force and writer.up_to_date(target, writer.export_inputs(plan.model, checkpoint, form))
    if not done:
        writer.check_target(target)
    about = _described(recipe, plan.output, checkpoint, repository)
    announce(export_need(recipe, plan.model), plan.output, plan.model, done=done)
    if dry_run:
        to = f", and {'would ' if done else ''}upload it to {repository}" if repository else ""
        what = f"up to date, {target}" if done else f"would write {target}, {recipe.export.format}, from {checkpoint.path}"
        say(f"export: {what}{to}")
        return
    with locked(plan.output):
        with interrupt.graceful():
            if done:
                # It may have been measured since.
                writer.write_card(target, plan.model, checkpoint, form, about)
                files.touch(target / writer.RECORD)
                say(f"export: up to date, {target}")
            else:
                writer.export(plan.model, checkpoint, target, form, about)
                without = "; quantizers of activations are left out" if checkpoint.activations and not by.quantizes else ""
                say(f"export: {by.fidelity(plan.model, form)}{without}")
                size = sum(file.stat().st_size for pattern in writer.WEIGHTS for file in target.glob(pattern))
                say(f"export: {target}, {recipe.export.format}, {size:,} bytes of weights")
            if repository is not None:
                interrupt.check()
        # A signal ends an upload at once: nothing is lost by it.
        if repository is not None:
            address = push(target, repository, private, f"lbllm {__version__}, {stage}, {form.format}")
            say(f"export: {address}")


def _described(recipe: Recipe, output: Path, checkpoint: Checkpoint, repository: str | None) -> Described:
    """What the card says; results are those of this checkpoint's very weights, where `lbllm eval` has measured them."""
    try:
        measured = read_results(output / "eval" / "results.json")
    except UsageError as error:
        say(f"export: the card has no results: {error}")
        measured = {}
    base, stage = measured.get(BASE), measured.get(checkpoint.stage, {})
    known = {"base": base, "stage": stage} if base and stage.get("checkpoint") == checkpoint.content else {}
    place = {} if repository is None else {"place": repository}
    return Described(recipe.model.path, results=known, **place)
