"""One stage from its beginning to its manifest: resume, streams, records, facts. The same for every stage."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lbllm_cli.core import files
from lbllm_cli.core.own_folders import STREAMS, remove_own
from lbllm_cli.end_to_end.student import WholeStudent
from lbllm_cli.end_to_end.teacher import teacher_folder, teacher_states
from lbllm_cli.end_to_end.trainer import EndToEndTrainer, train_whole
from lbllm_cli.pipeline import plan as prepare
from lbllm_cli.pipeline.block_loop import BlockLoop, Fit
from lbllm_cli.pipeline.checkpoint import MANIFEST, Checkpoint, StageWriter
from lbllm_cli.pipeline.forecast import Need
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.reporter import Reporter
from lbllm_cli.recipe.load import dump_recipe
from lbllm_cli.recipe.training import EndToEnd
from lbllm_cli.runtime.quantizer import ActivationFormat
from lbllm_cli.training.forecast import recomputes
from lbllm_cli.training.plots import plot_errors, plot_steps
from lbllm_cli.training.state import TrainingState


@dataclass(frozen=True)
class Stage:
    """A stage that is to run. tokens: int64 [rows, length]. inputs: what the checkpoint depends on. parent: the checkpoint that
    it goes on from. activations: how its blocks quantize them, if they do.
    """

    plan: Plan
    need: Need
    tokens: Tensor
    inputs: dict[str, Any]
    parent: Checkpoint | None = None
    activations: dict[str, Any] | None = None


Work = Callable[[Stage, StageWriter, Reporter], None]


def run_stage(stage: Stage, force: bool, work: Work) -> None:
    """Runs a stage, or finds it up to date. work: writes all of its blocks from the last committed one on."""
    recipe, model, name = stage.plan.recipe, stage.plan.model, stage.need.stage
    writer = StageWriter(stage.plan.output, name, stage.inputs)
    with Reporter(name, model.blocks, model.device, writer.path / "events.jsonl") as reporter:
        if not writer.open(force):
            _clean(writer.final)
            files.touch(writer.final / MANIFEST)
            reporter.note(f"up to date, {writer.final}")
            return
        writer.verify(model.blocks)
        model.check_outer()  # the head is read last: it would be found spoiled after days
        share = f"{model.binarized_share:.1%} of {model.count(list(model.shapes)):,} parameters are binarized"
        reporter.note(f"{model.blocks} blocks, {share}, group size {recipe.ptq.group_size}")
        files.write_text(writer.path / "recipe.resolved.yaml", dump_recipe(recipe))
        files.write_json(writer.path / "environment.json", prepare.environment(model.device))
        work(stage, writer, reporter)
    parent = stage.parent
    writer.finish(
        {
            "parent": None if parent is None else {"stage": parent.stage, "fingerprint": parent.fingerprint},
            "group_size": recipe.ptq.group_size,
            "blocks": model.blocks,
            "parameters": model.count(list(model.shapes)),
            "binarized_parameters": model.count(model.binarized_names),
            "tokens": stage.tokens.numel(),
            **({} if stage.activations is None else {"activations": stage.activations}),
        }
    )
    _clean(writer.final)
    reporter.note(f"finished in {reporter.used()}; {writer.final}")


def _clean(folder: Path) -> None:
    """Deletes what only an unfinished stage needs; not before it is finished, for the last steps may fail as well."""
    remove_own(folder / "streams", STREAMS)
    TrainingState.forget(folder)


def by_blocks(fit: Callable[[Reporter], Fit], activations: ActivationFormat | None = None) -> Work:
    """Work of a stage that goes through the blocks. fit: given who reports its progress."""

    def work(stage: Stage, writer: StageWriter, reporter: Reporter) -> None:
        recipe, model, parent = stage.plan.recipe, stage.plan.model, stage.parent
        if writer.blocks_done:
            reporter.note(f"resuming after block {writer.blocks_done} of {model.blocks}")
        streams = writer.path / "streams" if stage.need.on_disk else None
        keeper = None if parent is None else TrainingState(writer.path, recipe.runtime.save_minutes)
        loop = BlockLoop(model, writer, recipe.runtime.batch_size, streams, parent, keeper, activations)
        loop.run(stage.tokens, fit(reporter), reporter)
        if parent is not None:
            if outer := parent.read_outer():
                writer.write_outer(outer)
            plot_errors(writer.path / "events.jsonl", writer.path / "loss.png")

    return work


def end_to_end(settings: EndToEnd) -> Work:
    """Work of a last phase over the whole model."""

    def work(stage: Stage, writer: StageWriter, reporter: Reporter) -> None:
        plan, parent = stage.plan, stage.parent
        assert parent is not None
        reporter.total(0)
        keeper = TrainingState(writer.path, plan.recipe.runtime.save_minutes)
        folder = teacher_folder(settings) or writer.path / "streams"
        states = teacher_states(folder, plan.model, stage.tokens, plan.recipe.runtime.batch_size, reporter)
        student = WholeStudent(plan.model, parent, settings, recomputes(plan.recipe, plan.model, settings))
        section, seed = prepare.DATA[stage.need.stage], plan.recipe.runtime.seed
        trainer = EndToEndTrainer(student, stage.tokens, states, settings, section, seed, keeper, reporter, plan.model.device)
        facts = train_whole(trainer, parent, writer)
        reporter.record({"phase": "end-to-end", **facts})
        plot_steps(writer.path / "events.jsonl", writer.path / "loss.png")

    return work
