"""`lbllm eval`: what is measured already, what is still to be measured, and the table of both."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lbllm_cli.cli.forecasts import print_table
from lbllm_cli.core import interrupt
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import RunError, UsageError
from lbllm_cli.core.own_folders import check_own
from lbllm_cli.data.tokens import tokens_hash
from lbllm_cli.evaluation.forecast import eval_need, whole_model_need
from lbllm_cli.evaluation.run import EvaluationRun, wanted_checkpoints
from lbllm_cli.evaluation.tasks import plan_tasks
from lbllm_cli.export import writer
from lbllm_cli.parallel.group import ALONE, Group
from lbllm_cli.parallel.join import check_alike
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.folders import EVAL_STREAMS
from lbllm_cli.pipeline.forecast import announce
from lbllm_cli.pipeline.other_keys import other_keys
from lbllm_cli.pipeline.plan import prepare
from lbllm_cli.pipeline.ranks import held
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import EXPORT
from lbllm_cli.report.tables import results_table


@torch.no_grad()
def evaluate(recipe: Recipe, dry_run: bool, as_json: bool, force: bool, group: Group = ALONE) -> None:
    """`lbllm eval`. group: of ranks that measure together."""
    plan = prepare(recipe, evaluate=True, group=group)
    checkpoints = wanted_checkpoints(plan)
    # What it computes in is its own to choose.
    if warning := other_keys(plan, filter(None, checkpoints.values()), used=["model.dtype"]):
        say(f"eval: warning: {warning}")
    sets = plan.evaluation()
    tasks = plan_tasks(recipe.eval.tasks, recipe.eval.num_fewshot)
    need = eval_need(recipe, plan.model, {name: tokens.shape[0] for name, tokens in sets.items()}, len(checkpoints), plan.world)
    if tasks or EXPORT in checkpoints:
        need = whole_model_need(recipe, plan.model, need)
        plan.model.backend.check()  # what LBLLM_KERNELS asks for is refused now, not after the perplexities
    _check_folders(plan.output / "eval", checkpoints if tasks else {})
    run = EvaluationRun(plan, checkpoints, need.place, force)
    left = run.unknown(sets, tasks)
    announce(need, plan.output, plan.model, done=not left)
    if dry_run:
        counts = {name: f"{name} {tokens.shape[0]} x {tokens.shape[1]}" for name, tokens in sets.items()}
        for name, wanted in left.items():
            say(f"eval: would measure {name} on {', '.join(counts.get(one, one) for one in wanted)}")
        if not left:
            say(f"eval: up to date, {plan.output / 'eval' / 'results.json'}")
        return
    check_alike(group, {"checkpoints": ", ".join(checkpoints), **{name: tokens_hash(tokens) for name, tokens in sets.items()}})
    with held(plan.output, group), interrupt.graceful():
        found = run.results(sets, tasks)
    if found is None:
        return
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_table(Console(), console_table(found))
    if run.failed:
        listed = [f"{name}: a prediction on {text} is NaN or infinity" for name, text in run.failed]
        raise RunError("\n".join([*listed, "Everything else was measured and is kept; for these try model.dtype: float32"]))


def _check_folders(folder: Path, exported: dict[str, Checkpoint | None]) -> None:
    """Whether what is deleted or replaced in the folder is lbllm's. exported: checkpoints that are exported for tasks."""
    check_own(folder / "streams", EVAL_STREAMS)
    for name, checkpoint in exported.items():
        if checkpoint is not None:
            writer.check_target(folder / f"{name}.model")
    for name in ("results.json", "details.json"):
        if (folder / name).exists() and not (folder / "measured").exists():
            raise UsageError(f"{folder / name} is not of `lbllm eval`, which writes one there; move it away")


def console_table(results: dict[str, Any]) -> Table:
    """Base and stages side by side, as the report has them."""
    found = results_table(results)
    # Names of tasks and metrics are their authors': Text takes them literally.
    table = Table("", title="perplexity and divergence (lower is better), agreement and scores (higher is better), size")
    for name in found.columns:
        table.add_column(name, justify="right")
    for label, cells in found.rows:
        table.add_row(Text(label), *map(Text, cells))
    return table
