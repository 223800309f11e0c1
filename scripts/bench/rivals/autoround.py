"""AutoRound (SignSGD on rounding and ranges, arXiv 2309.05516) as its package has it: two bits, symmetric."""

from functools import partial
from typing import Any

import torch
from ground import Ground, Made, Rival
from torch import Tensor
from uniform import BITS, on_grid, uniform_bits

from lbllm_cli.models.tokenizer import open_tokenizer

# Sequences in a step. The package's 8 of them take 4,096 tokens here, and a core of a CPU 90 seconds for 200 steps of a block.
BATCH = 4


def make(group: int, iterations: int, ground: Ground) -> Made:
    """All block linears, each block trained on what the quantized ones before it make of the training text.

    A method that trains has the text of those that do; its steps are as many whatever the text.
    """
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(ground.model.folder, dtype=torch.bfloat16)
    count, length = ground.training.shape
    tuner = AutoRound(
        model,
        tokenizer=open_tokenizer(ground.plan.recipe.model, ground.model.folder),
        scheme=f"W2A16G{group}",
        iters=iterations,
        nsamples=count,
        seqlen=length,
        batch_size=BATCH,
        dataset=list(ground.training.split(1)),
        device_map="cpu",
        enable_torch_compile=False,
    )
    model, _ = tuner.quantize()
    weights = {name: _stored(model.get_submodule(name.removesuffix(".weight"))) for name in ground.model.binarized_names}
    return Made(weights, f"{count} x {length} tokens, {iterations} steps a block, batches of {BATCH} sequences (its default: 8)")


def _stored(linear: Any) -> Tensor:
    """Weights with the scale in float16; of a symmetric scheme the zero point is the middle code, and not stored."""
    weight = linear.weight.detach().float()
    scale = linear.scale.detach().float().view(weight.shape[0], -1)
    return on_grid(weight, scale, torch.full_like(scale, 2 ** (BITS - 1))).values()


RIVALS = {
    name: Rival(uniform_bits(group, zero_bits=0), f"2 + 16 / {group}", partial(make, group, iterations), asked)
    for name, group, iterations, asked in (
        ("AutoRound", 64, 200, False),
        ("AutoRound g32", 32, 200, False),
        ("AutoRound best", 64, 1000, True),
    )
}
