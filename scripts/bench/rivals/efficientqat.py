"""EfficientQAT after the paper (arXiv 2407.11062): Block-AP, and E2E-QP behind it. Written from its formulas.

Block-AP trains all of weights, scales and zero points of one block at a time: w_q = s (clamp(round(w / s) + round(z), 0, 3) -
round(z)), straight-through rounding, mean squared error of the block's output beside the full-precision block's. E2E-QP trains
scales alone by the next token's loss, the codes fixed.
"""

import math
from functools import partial

import torch
from ground import Ground, Made, Rival
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parametrize
from uniform import TOP, Codes, read_codes, uniform_bits, write_codes

from lbllm_cli.models.block import Block
from lbllm_cli.pipeline.streams import HiddenStream, advance, embed_stream

GROUP = 64
EPOCHS, BATCH = 2, 2
LR_QUANTIZER, LR_WEIGHT = 1e-4, 2e-5
# The paper's rates are for 4,096 steps of a block. With 256 steps, 16 times as large ones go as far: on 128 sequences the loss of
# SmolLM2's first block fell to 0.60 at the paper's, to 0.36 at 8 and to 0.24 at 30 times these.
SHORT = 16
# The paper's smallest scale, and what the cosine ends on as a share of the first rate.
SMALLEST, LAST = 1e-4, 0.05


class FakeQuantize(torch.autograd.Function):
    """(weight [out, groups, n], scale [out, groups, 1], zero) -> weights on the grid; both roundings pass gradients straight.

    Of a code inside 0 to 3 the gradients are 1 for the weight and code - zero - weight / scale for the scale; of one that is cut
    off 0 and code - zero, and -scale for the zero point. One function, for autograd's own graph of it takes twice as long.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """float32 in and out."""
        steps = weight / scale
        whole = zero.round()
        raw = steps.round().add_(whole)
        offset = raw.clamp(0, TOP)
        inside = raw == offset
        offset -= whole
        ctx.save_for_backward(scale, offset - steps * inside, inside)
        return offset * scale

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        """Of weight, scale and zero."""
        scale, slope, inside = ctx.saved_tensors
        straight = gradient * inside
        cut = (gradient.sum(-1, keepdim=True) - straight.sum(-1, keepdim=True)) * -scale
        return straight, (gradient * slope).sum(-1, keepdim=True), cut


class Quantized(nn.Module):
    """Parametrisation of a linear's weight [out, in]. scale, zero: [out, in / group, 1], both trained as floats."""

    def __init__(self, weight: Tensor, group: int):
        super().__init__()
        self.group = group
        groups = weight.detach().float().view(weight.shape[0], -1, group)
        least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((most - least) / TOP).clamp(min=SMALLEST)
        self.scale = nn.Parameter(scale)
        self.zero = nn.Parameter((-(least / scale)).round().clamp(0, TOP))

    def parts(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point within their ranges; gradients pass the bounds."""
        scale = self.scale + (self.scale.detach().clamp(min=SMALLEST) - self.scale.detach())
        zero = self.zero + (self.zero.detach().clamp(0, TOP) - self.zero.detach())
        return scale, zero

    def forward(self, weight: Tensor) -> Tensor:
        groups = weight.view(weight.shape[0], -1, self.group)
        values: Tensor = FakeQuantize.apply(groups, *self.parts())  # type: ignore[no-untyped-call]
        return values.view_as(weight)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes:
        """What a file holds of weights as trained."""
        scale, zero = self.parts()
        zero = zero.round()
        groups = weight.view(weight.shape[0], -1, self.group)
        codes = ((groups / scale).round() + zero).clamp(0, TOP)
        return Codes(codes.to(torch.uint8), scale.to(torch.float16), zero.to(torch.uint8))


def attach(block: Block, group: int = GROUP) -> dict[str, Quantized]:
    """Makes a block's linears quantized ones: name in the block -> its quantizer."""
    quantizers = {name: Quantized(block.linear(name).weight, group) for name in block.linears}
    for name, quantizer in quantizers.items():
        parametrize.register_parametrization(block.linear(name), "weight", quantizer)
        original(block, name).requires_grad_(True)
    return quantizers


def original(block: Block, name: str) -> Tensor:
    """The trained weight behind a quantized linear's."""
    found: Tensor = block.linear(name).get_submodule("parametrizations.weight").get_parameter("original")
    return found


def detach(block: Block, quantizers: dict[str, Quantized]) -> dict[str, Codes]:
    """Puts stored weights in their place: full name -> codes."""
    found = {}
    for name, quantizer in quantizers.items():
        codes = quantizer.codes(original(block, name))
        parametrize.remove_parametrizations(block.linear(name), "weight", leave_parametrized=False)
        block.set_weight(name, codes.values())
        found[f"{block.prefix}{name}.weight"] = codes
    return found


def cosine(step: int, steps: int) -> float:
    """Share of the first rate: 1 at step 0, LAST at the end."""
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * step / steps)) / 2


def train(
    block: Block, quantizers: dict[str, Quantized], inputs: Tensor, targets: Tensor, rates: float, seed: int
) -> tuple[float, float]:
    """Block-AP on one block whose linears are quantized; matrices are multiplied in bfloat16, everything else is in float32.

    inputs, targets: [rows, length, hidden]. rates: times the paper's. Returns mean losses of the first and last eighth of steps.
    """
    weights = [original(block, name) for name in quantizers]
    trained = [parameter for quantizer in quantizers.values() for parameter in quantizer.parameters()]
    groups = [{"params": weights, "lr": rates * LR_WEIGHT}, {"params": trained, "lr": rates * LR_QUANTIZER}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, foreach=True)
    steps = EPOCHS * (len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosine, steps=steps))
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(inputs), generator=generator)[: steps // EPOCHS * BATCH] for _ in range(EPOCHS)])
    losses = []
    for rows in order.view(steps, BATCH):
        with torch.autocast("cpu", torch.bfloat16):
            output = block(inputs[rows])
        loss = mse_loss(output.float(), targets[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(float(loss.detach()))
    part = max(1, steps // 8)
    return sum(losses[:part]) / part, sum(losses[-part:]) / part


@torch.no_grad()
def through(block: Block, inputs: HiddenStream, outputs: HiddenStream, batch_size: int) -> None:
    """A stream through a block as it is; matrices in bfloat16, as in training."""
    with torch.autocast("cpu", torch.bfloat16):
        advance(block, inputs, outputs, torch.device("cpu"), batch_size)


def block_ap(ground: Ground, rates: float) -> dict[str, Codes]:
    """Codes of all block linears after Block-AP; kept in the benchmark's folder, for E2E-QP goes on from them.

    They are written after every block: a stopped run takes up those that are there, and trains the others.
    """
    model, batch_size = ground.model, ground.plan.recipe.runtime.batch_size
    path = ground.out / f"block_ap-{rates}.safetensors"
    found = read_codes(path) if path.exists() else {}
    if len(found) == len(model.binarized_names):
        return found
    full = embed_stream(model, ground.training, None, batch_size)
    quantized, targets = embed_stream(model, ground.training, None, batch_size), full.like(None)
    for index in range(model.blocks):
        block = model.block(index)
        through(block, full, targets, batch_size)
        names = [f"{block.prefix}{name}.weight" for name in block.linears]
        if all(name in found for name in names):
            for local, name in zip(block.linears, names, strict=True):
                block.set_weight(local, found[name].values())
        else:
            assert quantized.data is not None
            assert targets.data is not None
            quantizers = attach(block)
            seed = ground.plan.recipe.runtime.seed + index
            first, last = train(block, quantizers, quantized.data, targets.data, rates, seed)
            found |= detach(block, quantizers)
            write_codes(path, found)
            print(f"Block-AP: block {index + 1} of {model.blocks}, loss {first:.5g} to {last:.5g}", flush=True)
        through(block, quantized, quantized, batch_size)
        full, targets = targets, full
    return found


def make(rates: float, ground: Ground) -> Made:
    """After its first phase."""
    rows, length = ground.training.shape
    note = f"{rows} x {length} tokens, {EPOCHS} epochs, batches of {BATCH}, {rates} times the paper's rates"
    return Made({name: codes.values() for name, codes in block_ap(ground, rates).items()}, note)


RIVALS = {
    name: Rival(uniform_bits(GROUP), f"2 + (16 + 2) / {GROUP}", partial(make, rates))
    for name, rates in (("EfficientQAT Block-AP", 1), (f"EfficientQAT Block-AP x{SHORT}", SHORT))
}
