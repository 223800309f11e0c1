"""EfficientQAT's second phase after the paper (arXiv 2407.11062), E2E-QP: whole model, scales alone, next token's loss."""

from typing import Any

import torch
from efficientqat import GROUP, SHORT, block_ap, cosine
from ground import Ground, Made, Rival
from torch import Tensor, nn
from torch.nn.utils import parametrize
from uniform import Codes, uniform_bits

# As many steps as the paper has: there 4,096 sequences in batches of 32, here 256 in batches of 2.
RATE, BATCH = 2e-5, 2


class Scaled(nn.Module):
    """Parametrisation of a linear's weight: codes stay, the scale [out, groups, 1] is trained."""

    steps: Tensor

    def __init__(self, codes: Codes):
        super().__init__()
        # -3 to 3, one byte a weight: there are as many of them as the model has weights.
        self.register_buffer("steps", codes.codes.to(torch.int8) - codes.zero.to(torch.int8))
        self.scale = nn.Parameter(codes.scale.float())

    def forward(self, weight: Tensor) -> Tensor:
        return (self.steps * self.scale).view_as(weight)


def train(model: nn.Module, scaled: dict[str, Scaled], tokens: Tensor, seed: int) -> tuple[float, float]:
    """One epoch; matrices in bfloat16. Returns the mean loss of the first and of the last eighth of the steps."""
    optimizer = torch.optim.AdamW([one.scale for one in scaled.values()], lr=RATE, weight_decay=0.0)
    steps, losses = len(tokens) // BATCH, []
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[: steps * BATCH]
    for step, rows in enumerate(order.view(steps, BATCH)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = model(input_ids=tokens[rows], labels=tokens[rows], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    part = max(1, steps // 8)
    return sum(losses[:part]) / part, sum(losses[-part:]) / part


def make(ground: Ground) -> Made:
    """From what Block-AP left; it runs first where it has not."""
    from transformers import AutoModelForCausalLM

    codes = block_ap(ground, SHORT)
    model: Any = AutoModelForCausalLM.from_pretrained(ground.model.folder, dtype=torch.float32).requires_grad_(False)
    scaled = {}
    for name, found in codes.items():
        scaled[name] = Scaled(found)
        parametrize.register_parametrization(model.get_submodule(name.removesuffix(".weight")), "weight", scaled[name])
    first, last = train(model, scaled, ground.training, ground.plan.recipe.runtime.seed)
    rows, length = ground.training.shape
    note = f"behind Block-AP x{SHORT}; {rows} x {length} tokens, one epoch, batches of {BATCH}; loss {first:.3f} to {last:.3f}"
    stored = {name: Codes(codes[name].codes, one.scale.detach().half(), codes[name].zero) for name, one in scaled.items()}
    return Made({name: found.values() for name, found in stored.items()}, note)


RIVALS = {"EfficientQAT E2E-QP": Rival(uniform_bits(GROUP), f"2 + (16 + 2) / {GROUP}", make)}
