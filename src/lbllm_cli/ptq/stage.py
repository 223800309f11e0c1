"""Stage 1 in the pipeline."""

from dataclasses import replace
from functools import partial

from torch import Tensor

from lbllm_cli.models.block import block_prefix
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.block_loop import BlockLoop
from lbllm_cli.pipeline.forecast import Need, activation_bytes, block_bytes, stage_need
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.work import StageRun, parents_activations
from lbllm_cli.ptq.fit import fit_block
from lbllm_cli.recipe.schema import Ptq
from lbllm_cli.recipe.stages import StageSpec

activations = parents_activations


def check(plan: Plan) -> None:
    """Every recipe can be binarized."""


def need(plan: Plan, spec: StageSpec, tokens: Tensor | None) -> Need:
    """Need of `lbllm ptq`."""
    recipe, model, text = plan.recipe, plan.model, plan.token_set(spec)
    heads = model.shapes[f"{block_prefix(0)}self_attn.o_proj.weight"][1] / model.config.hidden_size
    passing = activation_bytes(model, min(text.sequences, recipe.runtime.batch_size), text.length)
    # Teacher, and the student's replaced weights beside it; then the fit, when no activations are alive.
    device = 2 * block_bytes(model) + passing + _fit_bytes(model, recipe.ptq)
    # In sequential order the fit keeps what both streams' attention heads gave instead of computing it again.
    found = stage_need(plan, spec, device, 2 * heads if recipe.ptq.sequential else 0)
    keys = "lower runtime.batch_size, or set ptq.sequential: true or ptq.asymmetric: 0, which hold fewer Hessians at once"
    return replace(found, cheaper=keys)


def _fit_bytes(model: SourceModel, settings: Ptq) -> float:
    """Moments of the units collected together, and the work on the largest one: factor, inverse, weights, gradients."""
    shapes = {unit: [model.shapes[f"{block_prefix(0)}{name}.weight"] for name in unit] for unit in model.units}
    kinds = (2 if settings.asymmetric != 0 else 1) * (2 if settings.asymmetric == "auto" else 1)
    squares = [4.0 * unit[0][1] ** 2 for unit in shapes.values()]
    moments = kinds * (max(squares) if settings.sequential else sum(squares))
    work = max(9 * 4.0 * unit[0][1] ** 2 + 7 * 4.0 * sum(out * inn for out, inn in unit) for unit in shapes.values())
    return moments + work


def run(run: StageRun) -> None:
    """Fits block after block."""
    BlockLoop(run).run(partial(fit_block, settings=run.plan.recipe.ptq))
