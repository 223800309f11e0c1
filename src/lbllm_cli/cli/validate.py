"""`lbllm validate`: everything that can be told without running a stage."""

import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lbllm_cli.core.errors import UsageError
from lbllm_cli.end_to_end.teacher import teacher_folder
from lbllm_cli.evaluation import tasks as lm_tasks
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline import forecast
from lbllm_cli.pipeline import plan as prepare
from lbllm_cli.pipeline.checkpoint import check_stage, command_of, complete_stages
from lbllm_cli.pipeline.commands import Last, say
from lbllm_cli.pipeline.forecast import Need
from lbllm_cli.pipeline.reporter import GIB
from lbllm_cli.pipeline.stage_record import STAGES
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.training import forecast as forecast_training

_KINDS = ("device", "ram", "disk", "teacher", "streams")


@torch.no_grad()
def validate(recipe: Recipe, as_json: bool) -> None:
    """`lbllm validate`."""
    plan = prepare.prepare(recipe, weights=False, calibrate=True, train=True, evaluate=True)
    model = plan.model
    problems, segments = [], {}
    if plan.tokenizer is not None:
        for stage in _stages(recipe):
            try:
                if not plan.generates(stage):
                    plan.stage_tokens(stage)
            except UsageError as error:
                problems.append(str(error))
        try:
            segments = {name: rows.shape[0] for name, rows in plan.evaluation().items()}
        except UsageError as error:
            problems.append(str(error))
    try:
        tasks = lm_tasks.plan_tasks(recipe.eval.tasks, recipe.eval.num_fewshot)
    except UsageError as error:
        tasks = []
        problems.append(str(error))
    needs = [
        forecast.ptq_need(recipe, model),
        forecast_training.distill_need(recipe, model),
        forecast_training.act_calib_need(recipe, model),
        *(forecast_training.end_to_end_need(recipe, model, last, stage) for stage, last in _last_phases(recipe).items()),
        _eval_need(recipe, model, segments, bool(tasks)),
        forecast.export_need(recipe, model),
    ]
    warnings = []
    complete = complete_stages(plan.output)
    for need in needs:
        try:
            if need.stage in STAGES:
                check_stage(plan.output, need.stage, force=False)
            warnings += [f"{need.stage}: {warning}" for warning in forecast.memory_warnings(need, model.device)]
            if need.stage not in complete:
                forecast.check_disk(
                    need, plan.output, teacher_folder(plan.settings(need.stage)) if need.stage in STAGES else None
                )
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    unread = [spec.name for spec in recipe.data.evaluation if spec.segments is None and spec.name not in segments]
    if unread:
        warnings.append(f"eval: the streams of {', '.join(unread)} are not counted, their length shows when the text is read")
    if not model.entries:
        warnings.append(f"{model.folder} holds no weights: forecast only, weights and text are not checked")
    facts = {
        "blocks": model.blocks,
        "parameters": model.count(list(model.shapes)),
        "binarized_share": round(model.binarized_share, 4),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "forecast_bytes": {need.stage: {kind: round(getattr(need, kind)) for kind in _KINDS} for need in needs},
        "warnings": warnings,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print_validation(facts, needs)


def _eval_need(recipe: Recipe, model: SourceModel, segments: dict[str, int], tasks: bool) -> Need:
    need = forecast.eval_need(recipe, model, segments, 1 + len(_stages(recipe)))
    whole = tasks or "export" in (recipe.eval.checkpoints or [])
    return forecast.whole_model_need(recipe, model, need) if whole else need


def _last_phases(recipe: Recipe) -> dict[str, Last]:
    """Settings of the end-to-end phases that a recipe has, by stage."""
    found = {"distill-e2e": recipe.distill.end_to_end, "act-calib-e2e": recipe.act_calib.end_to_end}
    return {stage: settings for stage, settings in found.items() if settings is not None}


def _stages(recipe: Recipe) -> list[str]:
    """Stages of a recipe, in pipeline order."""
    return [stage for stage in STAGES if command_of(stage) == stage or stage in _last_phases(recipe)]


def _print_validation(facts: dict[str, Any], needs: list[Need]) -> None:
    table = Table(title="forecast, GiB")
    for column in ("stage", "device", "RAM", "disk", "streams", "streams in"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for need in needs:
        sizes = (f"{value / GIB:.1f}" for value in (need.device, need.ram, need.disk + need.teacher, need.streams))
        table.add_row(need.stage, *sizes, "disk" if need.on_disk else "RAM")
    out = Console()
    out.print(
        f"valid: {facts['blocks']} blocks, {facts['parameters']:,} parameters, {facts['binarized_share']:.1%} of them binarized, "
        f"computed in {facts['dtype']} on {facts['device']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    out.print(table)
    for warning in facts["warnings"]:
        say(f"warning: {warning}")
