"""What the Fisher information of a model's blocks will need, and how long it takes."""

from dataclasses import replace

from lbllm_cli.models.head import LOGITS
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.duration import BlockShape, Part
from lbllm_cli.pipeline.forecast import Need, block_bytes
from lbllm_cli.pipeline.plan import Plan


def _rows(plan: Plan) -> int:
    """Sequences of each rank."""
    most = plan.world.most(plan.recipe.data.training.sequences)
    return min(-(-plan.recipe.distill.fisher_sequences // plan.world.size), most)


def information_device(model: SourceModel, training: float) -> float:
    """Bytes on the device with the training of a block, `training`, which a matrix in the compute dtype is added to.

    By itself it takes a block with its matrix while that is factorised in float64, or the head with logits and their gradient.
    """
    square, vocab = int(model.config.hidden_size) ** 2, int(model.config.vocab_size)
    head = vocab * int(model.config.hidden_size) * model.dtype.itemsize
    alone = max(block_bytes(model) + 44.0 * square, head + 16.0 * max(LOGITS, vocab))
    return max(training + square * model.dtype.itemsize, alone)


def information_need(plan: Plan, need: Need) -> Need:
    """A stage's need with the matrices of all blocks in files, and with what enters each block in the place of the streams."""
    model, size = plan.model, int(plan.model.config.hidden_size)
    own = (model.blocks + 2) * _rows(plan) * plan.recipe.data.training.length * size * model.dtype.itemsize
    more, files = max(0.0, own - need.streams), 4.0 * size**2 * model.blocks
    return replace(
        need,
        device=need.device + (more if need.place == "device" else 0),
        ram=need.ram + (more if need.place == "ram" else 0),
        disk=need.disk + files + (more * plan.world.size if need.place == "disk" else 0),
        streams=need.streams + more,
    )


def information_work(plan: Plan) -> Part:
    """A pass there and one back, which computes blocks again, and products of slopes in float32."""
    model, length = plan.model, plan.recipe.data.training.length
    shape, tokens = BlockShape.of(model, length), float(_rows(plan) * length)
    head = 6.0 * model.config.vocab_size * shape.hidden * tokens
    return Part(
        "what predictions hang on", "distill.fisher_sequences", model.blocks * 3 * shape.forward(tokens) + head,
        exact=model.blocks * 2.0 * tokens * shape.hidden**2, passed=model.blocks * shape.passes(tokens),
        read=model.blocks * 4 * shape.states(tokens), written=model.blocks * 2 * shape.states(tokens),
    )  # fmt: skip
