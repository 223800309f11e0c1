"""`lbllm validate`: everything that can be told without running a stage."""

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.console import Console

from lbllm_cli.cli.durations import Durations
from lbllm_cli.cli.exchanges import Exchanges, share_problems
from lbllm_cli.cli.forecasts import forecast_table, print_table
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import UsageError
from lbllm_cli.data.sources import TextError, listed
from lbllm_cli.evaluation.forecast import eval_need, whole_model_need
from lbllm_cli.evaluation.tasks import Task, plan_tasks
from lbllm_cli.export.forecast import export_need
from lbllm_cli.pipeline.checkpoint import complete_stages
from lbllm_cli.pipeline.forecast import Need, check_device, check_disk, memory_warnings
from lbllm_cli.pipeline.plan import Plan, prepare
from lbllm_cli.pipeline.routing import routing_of
from lbllm_cli.pipeline.stage_writer import check_stage
from lbllm_cli.pipeline.work import work_of
from lbllm_cli.pipeline.world import World
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import EXPORT, STAGES, TABLE

_KINDS = ("device", "ram", "disk", "teacher", "streams")


@torch.no_grad()
def validate(recipe: Recipe, as_json: bool, world_size: int = 1, per_node: int | None = None) -> None:
    """`lbllm validate`. world_size, per_node: ranks that forecasts are for, see `World.asked`."""
    world = World.asked(world_size, per_node)
    tasks, unusable = _tasks(recipe)
    try:
        plan = prepare(recipe, weights=False, stages=TABLE, evaluate=True, asked=world)
    except UsageError as error:
        raise UsageError("\n".join([str(error), *unusable])) from None
    model = plan.model
    problems, segments = _texts(plan)
    problems += unusable + share_problems(plan)
    needs = [
        *(work_of(spec).need(plan, spec, None) for spec in sorted(recipe.stages, key=lambda spec: spec.end_to_end)),
        _eval_need(plan, segments, bool(tasks)),
        export_need(recipe, model),
    ]
    # Of what is there too little: then the tables say how much is missing.
    short, warnings = [], []
    complete = complete_stages(plan.output)
    for need in needs:
        try:
            if need.stage in STAGES:
                check_stage(plan.output, need.stage, force=False)
            warnings += [f"{need.stage}: {warning}" for warning in memory_warnings(need, model)]
        except UsageError as error:
            problems.append(str(error))
            continue
        if need.stage not in complete:
            short += _shortages(need, plan)
    if problems or (short and as_json):
        raise UsageError("\n".join(problems + short))
    times: Durations | Exchanges = Exchanges(plan, needs) if world.several else Durations(plan, needs)
    routing = routing_of(plan)
    warnings += _cautions(plan, segments)
    facts = {
        "blocks": model.blocks,
        "parameters": model.count(list(model.shapes)),
        "binarized_share": round(model.binarized_share, 4),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "forecast_bytes": {need.stage: {kind: round(getattr(need, kind)) for kind in _KINDS} for need in needs},
        **times.facts(),
        **({} if routing is None else {"routing": asdict(routing)}),
        "warnings": warnings,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        # What is refused has no result.
        out = Console(stderr=bool(short))
        _print_validation(out, facts, needs, not short, world)
        if routing is not None:
            say(f"ptq: {routing.line()}")
        times.show(out)
    if short:
        raise UsageError("\n".join(short))


def _texts(plan: Plan) -> tuple[list[str], dict[str, int]]:
    """Reads all text that is not still to be sampled: what is wrong with it, and segments of each evaluation set."""
    if plan.tokenizer is None:
        return [], {}
    found: dict[str, TextError] = {}
    problems: list[str] = []
    for stage in plan.recipe.stages:
        # What is wrong with a text is so for all stages that read it, a phase that names none of its own among them.
        key = stage.text if stage.text in plan.recipe.texts else "data.training"
        if key in found:
            continue
        try:
            plan.known_tokens(stage)
        except TextError as error:
            found[error.key] = error
        except UsageError as error:
            problems.append(str(error))
    problems = listed(found.values()) + problems
    try:
        return problems, {name: rows.shape[0] for name, rows in plan.evaluation().items()}
    except UsageError as error:
        return [*problems, str(error)], {}


def _cautions(plan: Plan, segments: dict[str, int]) -> list[str]:
    """What is no mistake, and yet to be known. segments: of the evaluation sets that were read."""
    found = []
    if unread := [spec.name for spec in plan.recipe.data.evaluation if spec.segments is None and spec.name not in segments]:
        found.append(f"eval: the streams of {', '.join(unread)} are not counted, their length shows when the text is read")
    found += filter(None, (plan.without_bos(TABLE, evaluate=True), plan.in_torch(), plan.padded()))
    if not plan.model.entries:
        found.append(f"{plan.model.folder} holds no weights: forecast only, weights and text are not checked")
    return found


def _tasks(recipe: Recipe) -> tuple[list[Task], list[str]]:
    """The tasks behind `eval.tasks`, and what is wrong with them."""
    try:
        return plan_tasks(recipe.eval.tasks, recipe.eval.num_fewshot), []
    except UsageError as error:
        return [], [str(error)]


def _shortages(need: Need, plan: Plan) -> list[str]:
    """What there is too little of, in words."""
    found = []
    for check in (partial(check_disk, need, plan.output), partial(check_device, need, plan.model)):
        try:
            check()
        except UsageError as error:
            found.append(str(error))
    return found


def _eval_need(plan: Plan, segments: dict[str, int], tasks: bool) -> Need:
    recipe, model = plan.recipe, plan.model
    need = eval_need(recipe, model, segments, 1 + len(recipe.stages), plan.world)
    whole = tasks or EXPORT in (recipe.eval.checkpoints or [])
    return whole_model_need(recipe, model, need) if whole else need


def _print_validation(out: Console, facts: dict[str, Any], needs: list[Need], valid: bool, world: World) -> None:
    out.print(
        f"{'valid: ' if valid else ''}{facts['blocks']} blocks, {facts['parameters']:,} parameters, "
        f"{facts['binarized_share']:.1%} of them binarized, "
        f"computed in {facts['dtype']} on {facts['device']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    print_table(out, forecast_table(needs, world))
    for warning in facts["warnings"]:
        say(f"warning: {warning}")
