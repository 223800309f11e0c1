"""Stage 2: weight-aware training, block by block, against the full-precision block.

As in LBLLM's stage 2; rates, schedules, starting latents and the parametrisation `nearest` are ours.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lbllm_cli.model import LINEARS, Block
from lbllm_cli.ops.binarize import unpack_codes
from lbllm_cli.stream import BlockTask
from lbllm_cli.trainable import BITMAP, LEVELS, PARAMETRISATIONS, WEIGHTS, Bitmap, Packed, Trainable
from lbllm_cli.training import Monitor, Trainer

if TYPE_CHECKING:
    from lbllm_cli.recipe import Distill


class BinarizedStudent:
    """A block whose linears are in training.

    teacher: the full-precision block, whose weights the latents start from. start: packed tensors by full name.
    """

    def __init__(self, teacher: Block, start: dict[str, Tensor], settings: "Distill"):
        self.block = teacher.sharing()
        self.settings = settings
        kind = PARAMETRISATIONS[settings.parametrisation]
        self.linears: dict[str, Trainable] = {}
        self.codes: dict[str, Tensor] = {}
        self.current: dict[str, Tensor] = {}
        for name in LINEARS:
            linear = teacher.linear(name)
            packed = _packed(start, teacher.prefix + name, linear.weight.device)
            self.linears[name] = kind(linear.weight, packed, settings.trained, settings.latent_margin)
            self.codes[name] = packed[0]
            self.block.linear(name).weight = nn.Parameter(torch.empty_like(linear.weight))

    def groups(self) -> list[dict[str, Any]]:
        """One group per linear and kind: rates of weights and levels are relative to the root mean square of the weights."""
        rates = {WEIGHTS: self.settings.lr_weights, LEVELS: self.settings.lr_levels, BITMAP: self.settings.lr_bitmap}
        groups = []
        for linear in self.linears.values():
            for kind, parameters in linear.kinds().items():
                if kind in self.settings.trained:
                    unit = 1.0 if kind == BITMAP else linear.rms
                    groups.append({"params": parameters, "kind": kind, "top": rates[kind] * unit, "unit": unit})
        return groups

    def begin(self) -> None:
        """Puts the present weights into the block."""
        for name, linear in self.linears.items():
            self.current[name] = linear()
            with torch.no_grad():
                self.block.linear(name).weight.copy_(self.current[name])

    def backward(self, progress: float) -> None:
        """Carries the gradients of the block's weights to the masters, and adds the regulariser's."""
        for name in self.linears:
            weight = self.block.linear(name).weight
            assert weight.grad is not None
            self.current.pop(name).backward(weight.grad.float())
            weight.grad = None
        if BITMAP in self.settings.trained and self.settings.polarise:
            begin, end = self.settings.polarise_beta
            count = sum(linear.out_features * linear.in_features for linear in self.linears.values())
            for linear in self.linears.values():
                assert isinstance(linear, Bitmap)
                linear.polarise(self.settings.polarise * progress, begin + (end - begin) * progress, count)

    def constrain(self) -> None:
        """After a step."""
        for linear in self.linears.values():
            linear.constrain(self.settings.dampening)

    def snapshot(self) -> dict[str, Tensor]:
        """The packed tensors of the block."""
        tensors: dict[str, Tensor] = {}
        for name, linear in self.linears.items():
            tensors |= named(self.block.prefix + name, linear.packed())
        return tensors

    def facts(self) -> dict[str, float]:
        """Shares of signs and bitmap bits that differ from the start, and how polarised the bitmaps are."""
        signs = bits = total = 0
        certain = 0.0
        for name, linear in self.linears.items():
            now, before = (unpack_codes(codes, linear.in_features) for codes in (linear.packed()[0], self.codes[name]))
            changed = now ^ before
            signs += int((changed & 1).sum())
            bits += int((changed >> 1).sum())
            total += now.numel()
            if isinstance(linear, Bitmap):
                certain += linear.certainty() * now.numel()
        facts = {"flipped_signs": signs / total, "flipped_bits": bits / total}
        return facts | ({"polarisation": certain / total} if certain else {})


def named(prefix: str, packed: Packed) -> dict[str, Tensor]:
    """Full names of a linear's packed tensors."""
    return dict(zip((f"{prefix}.weight", f"{prefix}.levels", f"{prefix}.scale"), packed, strict=True))


def _packed(start: dict[str, Tensor], prefix: str, device: torch.device) -> Packed:
    weight, levels, scale = (start[f"{prefix}.{part}"].to(device) for part in ("weight", "levels", "scale"))
    return weight, levels, scale


def fit_block(task: BlockTask, settings: "Distill", seed: int, monitor: Monitor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trains the linears of one block from the parent's.

    Returns the packed tensors under their full names, the parent's own where no epoch was better, and facts: the errors at the
    start, which epoch won, and one record per epoch.
    Raises RunError when more steps than allowed were not finite.
    """
    assert task.start is not None
    assert task.keeper is not None
    with torch.enable_grad():
        student = BinarizedStudent(task.teacher, task.start, settings)
        trainer = Trainer(task, student, settings, seed, task.keeper, monitor)
        best = trainer.run()
    progress = trainer.progress
    facts = {
        "before": progress.start,
        "after": progress.epochs[progress.best - 1]["held_out"] if progress.best else progress.start,
        "best_epoch": progress.best,
        "skipped": progress.skipped,
        "epochs": progress.epochs,
    }
    return (task.start if best is None else best), facts
