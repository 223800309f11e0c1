"""Stage 3 in the pipeline."""

from dataclasses import replace
from functools import partial

from torch import Tensor

from lbllm_cli.act_calib.fit import fit_block
from lbllm_cli.core.errors import UsageError
from lbllm_cli.format.activations import ActivationFormat
from lbllm_cli.pipeline.block_loop import BlockLoop
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.duration import Part
from lbllm_cli.pipeline.forecast import Need, stage_need
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.traffic import Exchanged
from lbllm_cli.pipeline.work import StageRun
from lbllm_cli.recipe.stages import StageSpec
from lbllm_cli.training.duration import block_training
from lbllm_cli.training.forecast import training_device, training_states
from lbllm_cli.training.plots import plot_errors
from lbllm_cli.training.traffic import block_exchanged

# Of fewer tokens the tables would follow single groups.
MIN_TOKENS = 256


def check(plan: Plan) -> None:
    """Raises UsageError where there are too few tokens to fit quantizers on."""
    recipe = plan.recipe
    tokens = (recipe.act_calib.sequences or recipe.data.training.sequences) * recipe.data.training.length
    if tokens < MIN_TOKENS:
        raise UsageError(
            f"data.training, act_calib.sequences: {tokens} tokens, act-calib fits its quantizers on at least {MIN_TOKENS}; "
            "raise sequences or length"
        )


def need(plan: Plan, spec: StageSpec, tokens: Tensor | None) -> Need:
    """Need of the blocks of `lbllm act-calib`."""
    recipe, model = plan.recipe, plan.model
    device = training_device(recipe, model, recipe.act_calib, plan.world)
    state, states = training_states(recipe, model, recipe.act_calib, plan.world)
    found = stage_need(plan, spec, device, state=state, states=states)
    return replace(found, cheaper="lower act_calib.micro_batch_size or runtime.batch_size")


def activations(plan: Plan, parent: Checkpoint | None) -> ActivationFormat:
    """As the recipe says."""
    settings = plan.recipe.act_calib
    return ActivationFormat(
        bits=settings.bits,
        kv_bits=settings.kv_bits,
        granularity=settings.granularity,
        form=settings.form,
        kv_form=settings.kv_form,
        tables=settings.tables,
        group_size=plan.recipe.step_group,
        key_centre=settings.key_centre == "mean" and plan.model.family.plain_softmax,
    )


def work(plan: Plan, spec: StageSpec) -> list[Part]:
    """Steps and passes of its blocks."""
    return block_training(plan, spec, 20)


def exchanged(plan: Plan, spec: StageSpec) -> Exchanged:
    """Gradients, weights and samples."""
    return block_exchanged(plan, spec, plan.recipe.act_calib)


def run(run: StageRun) -> None:
    """Fits and trains block after block."""
    recipe = run.plan.recipe
    assert run.activations is not None
    fit = partial(fit_block, settings=recipe.act_calib, layout=run.activations, seed=recipe.runtime.seed)
    BlockLoop(run).run(fit)
    run.keep_outer()
    if run.plan.group.first:
        plot_errors(run.writer.path / "events.jsonl", run.writer.path / "loss.png")
