"""How long the stages that train a block take: what their steps and passes compute and move."""

from typing import Any

from lbllm_cli.core.splits import held_out_rows
from lbllm_cli.pipeline.duration import BlockShape, Part, steps
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.recipe.stages import StageSpec
from lbllm_cli.training.forecast import owned_share
from lbllm_cli.training.spread import is_large

# That a step moves for each weight that has a latent: read, chosen, differentiated, and moved by AdamW. And for each whose code
# stays: decoded and differentiated.
LATENT_BYTES, _FIXED_BYTES = 38, 5
# Launches of a step for each linear of a block, at most: 600 of the usual seven.
_LAUNCHES = 600 / 7


def block_training(plan: Plan, spec: StageSpec, value_bytes: float = 0) -> list[Part]:
    """Parts of a stage that trains block by block, of the rank that has most.

    value_bytes: that quantizing moves for each value of a linear's input.
    """
    settings: Any = plan.settings(spec)
    weight_bytes = LATENT_BYTES if is_large(settings.trained) else _FIXED_BYTES
    model, text = plan.model, plan.token_set(spec)
    rows, blocks = settings.subset or text.sequences, model.blocks
    shape, held, most = BlockShape.of(model, text.length), held_out_rows(rows, settings.held_out), plan.world.most
    every, trained = float(most(rows) * text.length), float(most(rows - held) * text.length * settings.epochs)
    looked = float(most(held) * text.length * (settings.epochs + 1))
    # A step moves what the rank has masters of.
    owned = owned_share(model, settings.trained, plan.world)
    count = steps(rows, held, settings.batch_size, settings.epochs)
    values = sum(width * share for width, _, share in shape.inputs) * value_bytes
    training = Part(
        "training steps", f"{spec.text}.sequences", blocks * (3 * shape.forward(trained) + shape.forward(looked)),
        passed=blocks * (count * weight_bytes * owned * shape.weights + shape.passes(trained) + trained * values),
        read=blocks * 2 * shape.states(trained + looked), launches=blocks * count * _LAUNCHES * len(model.linears),
    )  # fmt: skip
    passing = Part(
        "passes of teacher and student", f"{spec.text}.sequences", blocks * 2 * shape.forward(every),
        passed=blocks * (shape.passes(every, 2 / 3) + every * values / 3), read=blocks * 2 * shape.states(every),
        written=blocks * 2 * shape.states(every),
    )  # fmt: skip
    return [training, passing]
