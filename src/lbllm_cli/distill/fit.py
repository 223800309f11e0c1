"""Stage 2: weight-aware training, block by block, against the full-precision block.

As in LBLLM's stage 2; rates, schedules, starting latents and the parametrisation `nearest` are ours.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.models.block import Block
from lbllm_cli.parallel.group import ALONE, Group
from lbllm_cli.pipeline.block_loop import BlockResult, BlockTask
from lbllm_cli.runtime.backend import weight_on
from lbllm_cli.training.block import block_loop, train_block
from lbllm_cli.training.block_linears import BlockLinears
from lbllm_cli.training.fixed import Fixed
from lbllm_cli.training.interfaces import OwnStep, ParameterGroup
from lbllm_cli.training.master import BITMAP, LEVELS, WEIGHTS
from lbllm_cli.training.spread import Spread
from lbllm_cli.training.weights import PARAMETRISATIONS, Bitmap, Trainable

if TYPE_CHECKING:
    from lbllm_cli.recipe.training import Distill


class BinarizedStudent:
    """A block whose linears are in training.

    teacher: the full-precision block, whose weights the latents start from. start: packed tensors by full name. group: of ranks
    that train it together.
    """

    def __init__(self, teacher: Block, start: dict[str, Tensor], settings: "Distill", group: Group = ALONE):
        self.settings = settings
        spread = Spread(group, settings.trained)
        self.counted = spread.node if spread.large else ALONE
        kind = PARAMETRISATIONS[settings.parametrisation]
        linears: dict[str, Trainable] = {}
        self.codes: dict[str, PackedWeight] = {}
        for name in spread.add(teacher.prefix, {name: teacher.linear(name) for name in teacher.linears}):
            weight = teacher.linear(name).weight
            packed = weight_on(PackedWeight.from_tensors(start, teacher.prefix + name, weight.shape[1]), weight.device)
            # Levels that are stored in few bits jump, and latents that rest on them would take others: codes that stay are kept.
            linears[name] = (
                kind(weight, packed, settings.trained, settings.latent_margin)
                if {WEIGHTS, BITMAP} & set(settings.trained)
                else Fixed(weight, packed, settings.trained)
            )
            self.codes[name] = packed
        self.weights = BlockLinears(teacher, start, linears, settings.trained, spread)
        self.block = self.weights.block
        self._weights = sum(teacher.linear(name).weight.numel() for name in teacher.linears)
        self._progress = 0.0

    def groups(self) -> list[ParameterGroup]:
        """AdamW groups."""
        settings = self.settings
        return self.weights.groups({WEIGHTS: settings.lr_weights, LEVELS: settings.lr_levels, BITMAP: settings.lr_bitmap})

    def begin(self, progress: float) -> None:
        """Puts the present weights into the block."""
        self._progress = progress
        self.weights.begin()

    def settle(self) -> None:
        """Weights of other ranks have come."""
        self.weights.settle()

    def backward(self) -> None:
        """Carries the gradients of the block's weights to the masters, and adds the regulariser's."""
        self.weights.backward()
        if BITMAP in self.settings.trained and self.settings.polarise:
            begin, end = self.settings.polarise_beta
            for linear in self.weights.linears.values():
                assert isinstance(linear, Bitmap)
                # An expert that no token of the step was sent to stays where it is.
                if linear.bitmap.grad is None:
                    continue
                linear.polarise(self.settings.polarise * self._progress, begin + (end - begin) * self._progress, self._weights)

    def spread_weights(self) -> list[tuple[nn.Parameter, int]]:
        """All weights, where codes are trained."""
        return self.weights.spread_weights()

    def copies(self) -> list[nn.Parameter]:
        """Levels, where they alone are trained."""
        return self.weights.copies()

    def own_steps(self) -> list[OwnStep]:
        """Latents whose step is a kernel."""
        return self.weights.own_steps(self.settings.dampening)

    def constrain(self) -> None:
        """After a step."""
        for linear in self.weights.linears.values():
            linear.constrain(self.settings.dampening)

    def resumed(self) -> None:
        """Nothing is derived from the parameters before the next `begin`."""

    def snapshot(self) -> dict[str, Tensor]:
        """The packed tensors of the block."""
        return self.weights.packed()

    def facts(self) -> dict[str, float]:
        """Shares of signs and bitmap bits that differ from the start, and how polarised the bitmaps are."""
        signs = bits = certain = 0.0
        for name, linear in self.weights.linears.items():
            now = linear.packed().unpacked()
            changed = now ^ self.codes[name].unpacked()
            signs += int((changed & 1).sum())
            bits += int((changed >> 1).sum())
            if isinstance(linear, Bitmap):
                certain += linear.certainty() * now.numel()
        signs, bits, certain = self.counted.total([signs, bits, certain])
        facts = {"flipped_signs": signs / self._weights, "flipped_bits": bits / self._weights}
        return facts | ({"polarisation": certain / self._weights} if certain else {})


def fit_block(task: BlockTask, settings: "Distill", seed: int) -> BlockResult:
    """Trains the linears of one block from the parent's; see `train_block`."""
    with torch.enable_grad():
        student = BinarizedStudent(task.teacher, task.start, settings, task.group)
        loop = block_loop(task, student, settings, "distill", seed, settings.ema_decay)
        return train_block(loop, task.start)
