"""Stage 2 in the pipeline."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from lbllm_cli.core.console import GIB
from lbllm_cli.distill.fit import fit_block
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.block_loop import BlockLoop
from lbllm_cli.pipeline.duration import Part
from lbllm_cli.pipeline.forecast import Need, stage_need
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.traffic import Exchanged
from lbllm_cli.pipeline.work import StageRun, parents_activations
from lbllm_cli.pipeline.world import World
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import StageSpec
from lbllm_cli.training.duration import block_training
from lbllm_cli.training.forecast import training_device, training_states
from lbllm_cli.training.plots import plot_errors
from lbllm_cli.training.traffic import block_exchanged

activations = parents_activations


def check(plan: Plan) -> None:
    """Every recipe can be distilled."""


def need(plan: Plan, spec: StageSpec, tokens: Tensor | None) -> Need:
    """Need of the blocks of `lbllm distill`."""
    recipe, model = plan.recipe, plan.model
    device = training_device(recipe, model, recipe.distill, plan.world)
    state, states = training_states(recipe, model, recipe.distill, plan.world)
    return replace(stage_need(plan, spec, device, state=state, states=states), cheaper=_cheaper(recipe, model, plan.world))


def _cheaper(recipe: Recipe, model: SourceModel, world: World) -> str:
    """Settings of distill that need less device memory, with what each alone would need."""
    settings = recipe.distill
    alternatives: dict[str, dict[str, Any]] = {}
    if settings.parametrisation == "bitmap":
        alternatives["distill.parametrisation: nearest"] = {"parametrisation": "nearest", "train": None}
    if min(settings.micro_batch_size, settings.batch_size) > 1:
        alternatives["distill.micro_batch_size: 1"] = {"micro_batch_size": 1}
    if settings.ema_decay is not None:
        alternatives["distill.ema_decay: null"] = {"ema_decay": None}
    if settings.trained != ("levels",):
        alternatives["distill.train: [levels]"] = {"train": ["levels"]}
    needs = {
        key: training_device(recipe, model, settings.model_copy(update=change), world) for key, change in alternatives.items()
    }
    listed = ", ".join(f"{key} ({need / GIB:.1f} GiB)" for key, need in needs.items())
    return f"cheaper: {listed}" if needs else "a larger GPU is needed"


def work(plan: Plan, spec: StageSpec) -> list[Part]:
    """Steps and passes of its blocks."""
    return block_training(plan, spec)


def exchanged(plan: Plan, spec: StageSpec) -> Exchanged:
    """Gradients, weights and what a better epoch leaves."""
    return block_exchanged(plan, spec, plan.recipe.distill)


def run(run: StageRun) -> None:
    """Trains block after block."""
    recipe = run.plan.recipe
    BlockLoop(run).run(partial(fit_block, settings=recipe.distill, seed=recipe.runtime.seed))
    run.keep_outer()
    if run.plan.group.first:
        plot_errors(run.writer.path / "events.jsonl", run.writer.path / "loss.png")
