"""Stage 3: activation-aware refinement. Quantizers of activations, keys and values, and the levels, trained block by block.

As in LBLLM's stage 3: codes frozen, piecewise quantizers with clipping factors and knees under a soft mask, levels trained with
them. The lattice, the two tables, the search they start from, and tables for keys and values are ours.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lbllm_cli.act_calib.search import SAMPLE, Sample, fit_knees
from lbllm_cli.core.splits import data_seed
from lbllm_cli.format.activations import ActivationFormat, Tables, split_groups, stored_centre, uniform_levels
from lbllm_cli.format.names import KEYS, VALUES, input_name
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.models.block import Block
from lbllm_cli.parallel.group import ALONE, Group
from lbllm_cli.parallel.shares import Owners
from lbllm_cli.pipeline.block_loop import BlockResult, BlockTask
from lbllm_cli.runtime.attachments import attach
from lbllm_cli.runtime.backend import backend_of, weight_on
from lbllm_cli.runtime.quantizer import empty_quantizer
from lbllm_cli.training.block import block_loop, train_block
from lbllm_cli.training.block_linears import BlockLinears
from lbllm_cli.training.fixed import Fixed
from lbllm_cli.training.interfaces import SEQUENCES, OwnStep, ParameterGroup
from lbllm_cli.training.knees import tables_of
from lbllm_cli.training.master import LEVELS, WEIGHTS
from lbllm_cli.training.quantizers import (
    CLIP_FACTORS,
    KNEES,
    TrainableQuantizer,
    anneal,
    mean_clip,
    quantizer_groups,
    quantizer_tensors,
)
from lbllm_cli.training.spread import Spread
from lbllm_cli.training.weights import Nearest, Trainable

if TYPE_CHECKING:
    from lbllm_cli.recipe.training import ActCalib

# What SAMPLE is meant for: of larger groups fewer are taken, so that a search costs the same.
_USUAL_GROUP = 64


class _Sample(nn.Module):
    """Stands where a quantizer will, and keeps what passes; through one of all experts, several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        # Linears of a unit read one tensor.
        if not self.seen or self.seen[-1] is not x:
            self.seen.append(x)
        return x


def sample_inputs(block: Block, hidden: Tensor) -> dict[str, Tensor]:
    """What each quantizer of a block would see: hidden [rows, length, hidden] -> [..., width] by quantizer name."""
    samples = {name: _Sample() for name in (*map(input_name, block.units), KEYS, VALUES)}
    handles = attach(block.layer, block.units, dict(samples))
    block(hidden)
    for handle in handles:
        handle.remove()
    return {name: sample.seen[0] if len(sample.seen) == 1 else torch.cat(sample.seen) for name, sample in samples.items()}


def fitted(
    inputs: dict[str, Tensor], layout: ActivationFormat, seed: int, train: tuple[str, ...], group: Group = ALONE
) -> dict[str, TrainableQuantizer]:
    """Quantizers by name as training starts from them, for inputs x [..., width] by name. seed: of the first one's sample. group:
    of ranks that have the same inputs, of which each searches for the tables of some.

    Keys [rows, heads, tokens, width] are centred by their mean, where the layout says so: with it 4 bits of the keys of
    SmolLM2-135M cost 0.014 to 0.030 nats instead of 0.029 to 0.056 (scripts/quantizer_costs.py).
    """
    forms = {name: empty_quantizer(layout, name, x.shape[-1], x.shape[1]) for name, x in inputs.items()}
    if layout.key_centre:
        forms[KEYS].act_centre = stored_centre(inputs[KEYS])
        inputs = {**inputs, KEYS: forms[KEYS].centred(inputs[KEYS])}
    samples = {
        name: Sample(_token_groups(x, forms[name].size, seed + number), forms[name].bits, layout.tables)
        for number, (name, x) in enumerate(inputs.items())
        if forms[name].tables.zero is not None
    }
    owner = Owners(group.size).give(dict.fromkeys(samples, 1.0))
    own = [name for name in samples if owner[name] == group.rank]
    searched = dict(zip(own, fit_knees([samples[name] for name in own]), strict=True))
    shapes = {name: found for one in group.facts(searched) for name, found in one.items()}
    found = {}
    for name, form in forms.items():
        device = inputs[name].device
        uniform = Tables(uniform_levels(form.bits).to(device), None, form.tables.clip.to(device))
        tables = tables_of(shapes[name], device) if name in shapes else uniform
        found[name] = TrainableQuantizer(tables, shapes.get(name), form.size, form.step_dtype, train, form.act_centre)
    return found


def _token_groups(x: Tensor, size: int, seed: int) -> Tensor:
    """Some groups of inputs x [..., width], drawn by chance: float32 [n, size]."""
    groups = split_groups(x.float(), size).reshape(-1, size)
    count = max(SAMPLE * _USUAL_GROUP // size, SAMPLE // 16)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))[:count]
    transfers = backend_of(x.device).transfers(x.device)
    return groups[order if transfers is None else transfers.small(order)]


class ActivationStudent:
    """A block with quantized activations, keys and values, whose quantizers and levels are in training.

    task: the block, with the packed tensors to start from. layout: how activations are quantized.
    """

    def __init__(self, task: BlockTask, settings: "ActCalib", layout: ActivationFormat, seed: int):
        self.settings = settings
        linears: dict[str, Trainable] = {}
        spread = Spread(task.group, settings.trained)
        for name in spread.add(task.teacher.prefix, {name: task.teacher.linear(name) for name in task.teacher.linears}):
            weight = task.teacher.linear(name).weight
            packed = weight_on(PackedWeight.from_tensors(task.start, task.teacher.prefix + name, weight.shape[1]), weight.device)
            linears[name] = (
                Nearest(weight, packed, settings.trained, settings.latent_margin)
                if WEIGHTS in settings.train
                else Fixed(weight, packed, settings.trained)
            )
        self.weights = BlockLinears(task.teacher, task.start, linears, settings.trained, spread)
        self.block = self.weights.block
        self.weights.begin()
        self.quantizers = self._fit(task, layout, seed)
        attach(self.block.layer, self.block.units, dict(self.quantizers))

    @torch.no_grad()
    def _fit(self, task: BlockTask, layout: ActivationFormat, seed: int) -> dict[str, TrainableQuantizer]:
        samples = sample_inputs(self.block, task.sample(task.quantized, SEQUENCES))
        return fitted(samples, layout, data_seed(seed, task.index) << 3, self.settings.trained, task.group)

    def groups(self) -> list[ParameterGroup]:
        """AdamW groups: those of the levels, and one per quantizer and kind."""
        settings = self.settings
        groups = self.weights.groups({WEIGHTS: settings.lr_weights, LEVELS: settings.lr_levels})
        return groups + self._quantizer_groups()

    def _quantizer_groups(self) -> list[ParameterGroup]:
        settings = self.settings
        rates = {CLIP_FACTORS: settings.lr_clip_factors, KNEES: settings.lr_knees}
        trained: dict[str, float] = {kind: rate for kind, rate in rates.items() if kind in settings.trained}
        return quantizer_groups(self.quantizers.values(), trained)

    def begin(self, progress: float) -> None:
        """Puts the present weights into the block; knees are soft in the first part of training, then they stay."""
        self.weights.begin()
        anneal(self.quantizers.values(), progress, self.settings.soft, self.settings.temperature)

    def settle(self) -> None:
        """Weights of other ranks have come."""
        self.weights.settle()

    def backward(self) -> None:
        """Carries the gradients of the block's weights to the levels; the quantizers have theirs."""
        self.weights.backward()

    def spread_weights(self) -> list[tuple[nn.Parameter, int]]:
        """All weights, where codes are trained."""
        return self.weights.spread_weights()

    def copies(self) -> list[nn.Parameter]:
        """Quantizers, and levels where codes are not trained."""
        return self.weights.copies() + [p for group in self._quantizer_groups() for p in group.params]

    def own_steps(self) -> list[OwnStep]:
        """Latents whose step is a kernel."""
        return self.weights.own_steps(self.settings.dampening)

    def constrain(self) -> None:
        """After a step."""
        for linear in self.weights.linears.values():
            linear.constrain(self.settings.dampening)
        for quantizer in self.quantizers.values():
            quantizer.constrain()

    def resumed(self) -> None:
        """After the parameters were replaced by saved ones."""
        for quantizer in self.quantizers.values():
            quantizer.deploy()

    def snapshot(self) -> dict[str, Tensor]:
        """The tensors of the block: packed linears, and levels, zeros and clipping factors of the quantizers."""
        return self.weights.packed() | quantizer_tensors(self.block.prefix, self.quantizers)

    def facts(self) -> dict[str, float]:
        """Mean clipping factor, and the share of coarse ratios that moved to another integer."""
        facts = {"clip_factor": mean_clip(self.quantizers.values())}
        moved = [quantizer.moved_ratios() for quantizer in self.quantizers.values() if quantizer.shapes]
        return facts | ({"moved_ratios": float(torch.cat(moved).mean())} if moved else {})


def fit_block(task: BlockTask, settings: "ActCalib", layout: ActivationFormat, seed: int) -> BlockResult:
    """Fits the quantizers of one block and trains them with its levels; see `train_block`, whose start is as they are fitted."""
    with torch.enable_grad():
        student = ActivationStudent(task, settings, layout, seed)
        start = student.snapshot()
        return train_block(block_loop(task, student, settings, "act_calib", seed), start)
