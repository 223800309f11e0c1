"""One stage from its first block to its manifest: resume, streams, records, facts. The same for every stage."""

import shutil
from collections.abc import Callable

from torch import Tensor

from lbllm_cli import files, prepare
from lbllm_cli.activations import ActivationFormat
from lbllm_cli.checkpoint import MANIFEST, Checkpoint, StageWriter, TrainingState
from lbllm_cli.forecast import Need
from lbllm_cli.plots import plot_errors
from lbllm_cli.prepare import Plan
from lbllm_cli.recipe_file import dump_recipe
from lbllm_cli.report import Reporter
from lbllm_cli.stream import BlockLoop, Fit


def run_stage(
    plan: Plan,
    need: Need,
    tokens: Tensor,
    inputs: dict[str, object],
    force: bool,
    fit: Callable[[Reporter], Fit],
    parent: Checkpoint | None = None,
    activations: ActivationFormat | None = None,
) -> None:
    """Runs stage `need.stage`, or finds it up to date.

    tokens: int64 [rows, length]. inputs: what the checkpoint depends on. fit: the stage's fit, given who reports its progress.
    parent: the checkpoint that the stage goes on from. activations: how the stage's blocks quantize them, if they do.
    """
    recipe, model, stage = plan.recipe, plan.model, need.stage
    writer = StageWriter(plan.output, stage, inputs)
    events = writer.path / "events.jsonl"
    with Reporter(stage, model.blocks, model.device, events) as reporter:
        if not writer.open(force):
            files.touch(writer.final / MANIFEST)
            reporter.note(f"up to date, {writer.final}")
            return
        writer.verify()
        share = f"{model.binarized_share:.1%} of {model.count(list(model.shapes)):,} parameters are binarized"
        reporter.note(f"{model.blocks} blocks, {share}, group size {recipe.ptq.group_size}")
        if writer.blocks_done:
            reporter.note(f"resuming after block {writer.blocks_done} of {model.blocks}")
        files.write_text(writer.path / "recipe.resolved.yaml", dump_recipe(recipe))
        files.write_json(writer.path / "environment.json", prepare.environment(model.device))
        streams = writer.path / "streams" if need.on_disk else None
        keeper = TrainingState(writer.path, recipe.runtime.save_minutes) if parent is not None else None
        loop = BlockLoop(model, writer, recipe.runtime.batch_size, streams, parent, keeper, activations)
        loop.run(tokens, fit(reporter), reporter)
    shutil.rmtree(writer.path / "streams", ignore_errors=True)
    if parent is not None:
        plot_errors(events, writer.path / "loss.png")
    writer.finish(
        {
            "parent": None if parent is None else {"stage": parent.stage, "fingerprint": parent.fingerprint},
            "group_size": recipe.ptq.group_size,
            "blocks": model.blocks,
            "parameters": model.count(list(model.shapes)),
            "binarized_parameters": model.count(model.binarized_names),
            "tokens": tokens.numel(),
            **({} if activations is None else {"activations": activations.as_dict()}),
        }
    )
    reporter.note(f"finished in {reporter.used()}; {writer.final}")
