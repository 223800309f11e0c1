"""Stage 3: activation-aware refinement. Quantizers of activations, keys and values, and the levels, trained block by block.

As in LBLLM's stage 3: codes frozen, piecewise quantizers with clipping factors and knees under a soft mask, levels trained with
them. The lattice, the two tables, the search they start from, and tables for keys and values are ours.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lbllm_cli.act_calib.search import SAMPLE, fit_knee, tables_of
from lbllm_cli.format.activations import Tables, split_groups, uniform_levels
from lbllm_cli.models.model import LINEARS, Block
from lbllm_cli.pipeline.block_loop import BlockTask
from lbllm_cli.runtime.attachments import attach
from lbllm_cli.runtime.quantizer import INPUTS, KEYS, VALUES, ActivationFormat
from lbllm_cli.training.block import Trainer
from lbllm_cli.training.block_linears import BlockLinears, packed_of
from lbllm_cli.training.interfaces import Monitor
from lbllm_cli.training.quantizers import (
    CLIP_FACTORS,
    KNEES,
    TrainableQuantizer,
    anneal,
    mean_clip,
    quantizer_groups,
    quantizer_tensors,
)
from lbllm_cli.training.weights import LEVELS, WEIGHTS, Fixed, Nearest, Trainable

if TYPE_CHECKING:
    from lbllm_cli.recipe.training import ActCalib

# Sequences whose activations the quantizers' tables are fitted on.
_SEQUENCES = 8
# Of fewer tokens the tables would follow single groups.
MIN_TOKENS = 256
# What SAMPLE is meant for: of larger groups fewer are taken, so that a search costs the same.
_USUAL_GROUP = 64


def activation_format(settings: "ActCalib", group_size: int) -> ActivationFormat:
    """How the activations of a checkpoint of this stage are quantized."""
    return ActivationFormat(
        bits=settings.bits,
        kv_bits=settings.kv_bits,
        granularity=settings.granularity,
        form=settings.form,
        kv_form=settings.kv_form,
        tables=settings.tables,
        group_size=group_size,
    )


class _Sample(nn.Module):
    """Stands where a quantizer will, and keeps what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


def sample_inputs(block: Block, hidden: Tensor) -> dict[str, Tensor]:
    """What each quantizer of a block would see: hidden [rows, length, hidden] -> [..., width] by quantizer name."""
    samples = {name: _Sample() for name in (*INPUTS, KEYS, VALUES)}
    handles = attach(block.layer, dict(samples))
    block(hidden)
    for handle in handles:
        handle.remove()
    return {name: sample.seen for name, sample in samples.items()}


def fitted(name: str, x: Tensor, layout: ActivationFormat, seed: int, train: tuple[str, ...]) -> TrainableQuantizer:
    """The quantizer `name` as training starts from it, for inputs x [..., width]."""
    form = layout.empty(name, x.shape[-1])
    if form.tables.zero is None:
        tables = Tables(uniform_levels(form.bits).to(x.device), None, form.tables.clip.to(x.device))
        return TrainableQuantizer(tables, None, form.size, form.step_dtype, train)
    groups = split_groups(x.float(), form.size).reshape(-1, form.size)
    count = max(SAMPLE * _USUAL_GROUP // form.size, SAMPLE // 16)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))[:count].to(x.device)
    shapes = fit_knee(groups[order], form.bits, layout.tables)
    return TrainableQuantizer(tables_of(shapes, x.device), shapes, form.size, form.step_dtype, train)


class ActivationStudent:
    """A block with quantized activations, keys and values, whose quantizers and levels are in training.

    task: the block, with the packed tensors to start from. layout: how activations are quantized.
    """

    def __init__(self, task: BlockTask, settings: "ActCalib", layout: ActivationFormat, seed: int):
        assert task.start is not None
        self.settings = settings
        linears: dict[str, Trainable] = {}
        for name in LINEARS:
            weight = task.teacher.linear(name).weight
            packed = packed_of(task.start, task.teacher.prefix + name, weight.device)
            linears[name] = (
                Nearest(weight, packed, settings.trained, settings.latent_margin)
                if WEIGHTS in settings.train
                else Fixed(weight, packed, settings.trained)
            )
        self.weights = BlockLinears(task.teacher, task.start, linears, settings.trained)
        self.block = self.weights.block
        self.weights.begin()
        self.quantizers = self._fit(task, layout, seed)
        attach(self.block.layer, dict(self.quantizers))

    @torch.no_grad()
    def _fit(self, task: BlockTask, layout: ActivationFormat, seed: int) -> dict[str, TrainableQuantizer]:
        rows = task.quantized.rows
        taken = torch.linspace(0, rows - 1, min(_SEQUENCES, rows)).round().long()
        samples = sample_inputs(self.block, task.quantized.data[taken].to(task.device))
        own = ((seed << 20) + task.index) % (1 << 50) << 3
        return {
            name: fitted(name, x, layout, own + number, self.settings.trained) for number, (name, x) in enumerate(samples.items())
        }

    def groups(self) -> list[dict[str, Any]]:
        """AdamW groups: those of the levels, and one per quantizer and kind."""
        settings = self.settings
        groups = self.weights.groups({WEIGHTS: settings.lr_weights, LEVELS: settings.lr_levels})
        rates = {CLIP_FACTORS: settings.lr_clip_factors, KNEES: settings.lr_knees}
        trained: dict[str, float] = {kind: rate for kind, rate in rates.items() if kind in settings.trained}
        return groups + quantizer_groups(self.quantizers.values(), trained)

    def begin(self, progress: float) -> None:
        """Puts the present weights into the block; knees are soft in the first part of training, then they stay."""
        self.weights.begin()
        anneal(self.quantizers.values(), progress, self.settings.soft, self.settings.temperature)

    def backward(self) -> None:
        """Carries the gradients of the block's weights to the levels; the quantizers have theirs."""
        self.weights.backward()

    def constrain(self) -> None:
        """After a step."""
        for linear in self.weights.linears.values():
            linear.constrain(self.settings.dampening)
        for quantizer in self.quantizers.values():
            quantizer.constrain()

    def followers(self) -> list[Tensor]:
        """Frozen latents."""
        return self.weights.followers()

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


def fit_block(
    task: BlockTask, settings: "ActCalib", layout: ActivationFormat, seed: int, monitor: Monitor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fits the quantizers of one block and trains them with its levels.

    Returns packed tensors and quantizers under their full names, as fitted where no epoch was better, and facts as `distill`'s.
    Raises RunError when more steps than allowed were not finite.
    """
    assert task.keeper is not None
    with torch.enable_grad():
        student = ActivationStudent(task, settings, layout, seed)
        start = student.snapshot()
        trainer = Trainer(task, student, settings, "act_calib", seed, task.keeper, monitor)
        best = trainer.run()
    return (start if best is None else best), trainer.facts()
