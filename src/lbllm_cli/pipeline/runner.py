"""One command from its recipe to the manifests of its stages: checks, resume, records, facts. The same for every stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.own_folders import remove_own
from lbllm_cli.models.model import SourceModel
from lbllm_cli.parallel.group import ALONE, Group
from lbllm_cli.parallel.join import check_alike
from lbllm_cli.pipeline.checkpoint import MANIFEST, Checkpoint, complete_stages, unfinished
from lbllm_cli.pipeline.environment import environment
from lbllm_cli.pipeline.folders import STREAMS
from lbllm_cli.pipeline.forecast import Need, announce
from lbllm_cli.pipeline.lineage import open_parent, stage_inputs
from lbllm_cli.pipeline.plan import Plan, prepare
from lbllm_cli.pipeline.ranks import await_file, check_shares, held
from lbllm_cli.pipeline.reporter import Reporter
from lbllm_cli.pipeline.stage_writer import StageWriter, check_stage, end_force, made_by_force
from lbllm_cli.pipeline.training_state import TrainingState
from lbllm_cli.pipeline.work import StageRun, work_of
from lbllm_cli.recipe.load import dump_recipe
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import TABLE, Phase, StageSpec


@torch.no_grad()
def run_command(
    recipe: Recipe, command: str, dry_run: bool, force: bool, only: Phase | None = None, group: Group = ALONE
) -> None:
    """`lbllm ptq` and its like: the stages of a command, one after the other. only: one of its phases; default all of the
    recipe. group: of ranks that do them together."""
    own = [spec for spec in TABLE if spec.command == command]
    # Of stages before it too: what they read is compared.
    plan = prepare(recipe, stages=TABLE[: TABLE.index(own[-1]) + 1], group=group)
    for spec in own:
        if spec.end_to_end and only != "blocks":
            _check_end_to_end(plan, spec, asked=only is not None)
    for warning in filter(None, (plan.without_bos(own[:1]), plan.in_torch(), plan.padded())):
        say(f"{command}: warning: {warning}")
    chosen = [spec for spec in own if spec in plan.recipe.stages and only in (None, spec.phase)]
    changed: list[StageSpec] = []  # by the stages that a dry run has gone through
    for number, spec in enumerate(chosen):
        if number and not dry_run:
            interrupt.check()  # a signal that came while the stage before it was being finished
        ahead = chosen[number + 1 :]
        if not dry_run:
            run_stage(plan, spec, force, ahead)
        elif _foretell(plan, spec, force, ahead, changed):
            changed.append(spec)


def _check_end_to_end(plan: Plan, spec: StageSpec, asked: bool) -> None:
    """Reads the text of an end-to-end phase now: too little is not found after all blocks. asked: whether `--only` names it."""
    if spec in plan.recipe.stages:
        plan.known_tokens(spec)
    elif asked:
        raise UsageError(f"--only {spec.phase}: the recipe has no {spec.section}; add it, for example sequences: 128")


@dataclass(frozen=True)
class _Checked:
    """A stage of which everything was checked that can be before it writes. tokens: None where they are still to be sampled."""

    need: Need
    parent: Checkpoint | None
    tokens: Tensor | None
    writer: StageWriter


def _check(plan: Plan, spec: StageSpec, force: bool, ahead: Sequence[StageSpec]) -> _Checked:
    """Checks what a stage goes on from, reads its text, and says what it needs. ahead: stages that the command goes on with, of
    which what can be checked is checked as well: kept states of a teacher are not found wrong after all blocks.
    """
    before, work = plan.recipe.parent(spec), work_of(spec)
    work.check(plan)
    check_stage(plan.output, spec.name, force)
    if before is not None:
        await_file(plan.output / before.name / MANIFEST, plan.group)
    parent = open_parent(plan, spec)
    for later in ahead:
        work_of(later).need(plan, later, plan.known_tokens(later))
    tokens = plan.known_tokens(spec)
    need = work.need(plan, spec, tokens)
    finished = spec.name in complete_stages(plan.output) and not unfinished(plan.output, spec.name).exists()
    kept = not force or (bool(ahead) and made_by_force(plan.output, spec.name))
    announce(need, plan.output, plan.model, done=finished and kept)
    if tokens is None:
        say(f"{spec}: {spec.text} text is sampled from the model, which is whole in memory meanwhile")
    writer = StageWriter(plan.output, spec.name, stage_inputs(plan, spec, tokens, parent), plan.group, more=bool(ahead))
    return _Checked(need, parent, tokens, writer)


def _foretell(plan: Plan, spec: StageSpec, force: bool, ahead: Sequence[StageSpec], changed: Sequence[StageSpec]) -> bool:
    """Says what a run would do, after the checks that it would make; whether it would write the stage.

    changed: stages before it in the same command that it would write.
    """
    before = plan.recipe.parent(spec)
    if before in changed:
        work_of(spec).check(plan)
        check_stage(plan.output, spec.name, force)
        say(f"{spec}: would go on from {before} once that is written")
        return True
    checked = _check(plan, spec, force, ahead)
    writer, parent = checked.writer, checked.parent
    check_shares(plan, spec, plan.shape(spec)[0])
    check_alike(plan.group, writer.inputs)
    standing = writer.look(force)
    if standing == "finished":
        Checkpoint(plan.output, spec.name).verify()
        sampled = "" if checked.tokens is not None else ", if the text that it would sample is the same"
        say(f"{spec}: up to date, {writer.final}{sampled}")
        return False
    writer.verify(plan.model.blocks)
    if standing == "nothing":
        say(f"{spec}: would write {writer.final}" + (f", from {parent.path}" if parent else ""))
    else:
        done = "" if spec.end_to_end else f" after block {writer.blocks_done} of {plan.model.blocks}"
        say(f"{spec}: would resume{done}, {writer.path}")
    return True


def run_stage(plan: Plan, spec: StageSpec, force: bool, ahead: Sequence[StageSpec] = ()) -> None:
    """Runs a stage after its checks; see `_check`."""
    checked = _check(plan, spec, force, ahead)
    writer, parent, tokens = checked.writer, checked.parent, checked.tokens
    with held(plan.output, plan.group), interrupt.graceful():
        check_shares(plan, spec, plan.shape(spec)[0])
        with Reporter(spec.name, plan.model, writer.path / "events.jsonl", plan.group) as reporter:
            if tokens is None:
                writer.look(force)  # what is refused whatever the text turns out to be is not sampled for
                tokens = plan.stage_tokens(spec, reporter)
                writer.inputs = stage_inputs(plan, spec, tokens, parent)
            check_alike(plan.group, writer.inputs)
            activations = work_of(spec).activations(plan, parent)
            _write(StageRun(spec, plan, checked.need, tokens, parent, activations, writer, reporter), force)


def _write(run: StageRun, force: bool) -> None:
    """Runs a stage, or finds it up to date."""
    model, writer, reporter = run.plan.model, run.writer, run.reporter
    if not writer.open(force):
        if writer.group.first:
            _clean(writer)
            files.touch(writer.final / MANIFEST)
        reporter.note(f"up to date, {writer.final}")
        return
    writer.verify(model.blocks)
    model.check_outer()  # the head is read last: it would be found spoiled after days
    share = f"{model.binarized_share:.1%} of {model.count(list(model.shapes)):,} parameters are binarized"
    reporter.note(f"{model.blocks} blocks, {share}, group size {model.group_sizes(run.plan.recipe.ptq)}")
    places = writer.group.facts(environment(model.device))
    if writer.group.first:
        files.write_text(writer.path / "recipe.resolved.yaml", dump_recipe(run.plan.recipe))
        files.write_json(writer.path / "environment.json", places[0] | ({"ranks": places} if len(places) > 1 else {}))
    if writer.resumes and force:
        reporter.note(f"going on with the run that --force began; to begin it again delete {writer.path}")
    if writer.blocks_done and not run.spec.end_to_end:
        reporter.note(f"resuming after block {writer.blocks_done} of {model.blocks}")
    work_of(run.spec).run(run)
    writer.finish(_facts(run, model, run.parent))
    if writer.group.first:
        _clean(writer)
    reporter.note(f"finished in {reporter.used()}; {writer.final}")


def _facts(run: StageRun, model: SourceModel, parent: Checkpoint | None) -> dict[str, Any]:
    """What readers of the manifest need."""
    return {
        "parent": None if parent is None else {"stage": parent.stage, "fingerprint": parent.fingerprint},
        "group_size": (sizes := model.group_sizes(run.plan.recipe.ptq)).size,
        **sizes.as_dict(),
        **({} if (bits := run.plan.recipe.ptq.level_bits) == 8 else {"level_bits": bits}),
        "blocks": model.blocks,
        "parameters": model.count(list(model.shapes)),
        "binarized_parameters": model.binarized_parameters,
        "tokens": run.tokens.numel(),
        **({} if run.activations is None else {"activations": run.activations.as_dict()}),
    }


def _clean(writer: StageWriter) -> None:
    """Deletes what only an unfinished stage needs, and after the last one what only an unfinished command needs.

    Not before it is finished, for the last steps may fail as well.
    """
    remove_own(writer.final / "streams", STREAMS)
    TrainingState.forget(writer.final)
    if not writer.more:
        end_force(writer.final.parent, [spec.name for spec in TABLE if spec.command == writer.spec.command])
