"""Training of one block against the full-precision block's outputs.

The student's present weights enter its block, and gradients go back through the straight-through estimators once a step.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lbllm_cli.pipeline.block_loop import BlockResult, BlockTask
from lbllm_cli.pipeline.metrics import BlockError, channel_scale, massive_tokens, robust_error
from lbllm_cli.pipeline.streams import fetched
from lbllm_cli.training.interfaces import SEQUENCES, Step, Student
from lbllm_cli.training.loop import Job, TrainingLoop
from lbllm_cli.training.progress import Progress

if TYPE_CHECKING:
    from lbllm_cli.recipe.training import Training


class BlockObjective:
    """That a student's block turns the quantized stream into the targets."""

    errors: ClassVar[tuple[str, ...]] = ("error", "error_ordinary", "per_token", "per_token_ordinary", "per_token_robust")

    def __init__(self, task: BlockTask, student: Student, settings: "Training"):
        self.student, self.task = student, task
        self.kind, self.pieces = settings.loss, settings.micro_batch_size
        self.inputs, self.targets, self.device = task.quantized, task.targets, task.device
        self.scale = self._scale(settings.channel_cap)

    @torch.no_grad()
    def _scale(self, cap: float | None) -> Tensor | None:
        """What both outputs are multiplied by, [hidden]; see `channel_scale`."""
        if cap is None:
            return None
        return channel_scale(self.task.sample(self.targets, SEQUENCES), cap)

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.scale is None else hidden.float() * self.scale

    def feed(self, pieces: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Inputs and targets."""
        return fetched((self.inputs, self.targets), pieces, self.device)

    def loss(self, piece: tuple[Tensor, ...], start: dict[str, float]) -> Tensor:
        """Squared error of a micro-batch, 1 for the start's error on held-out sequences.

        plain: over all tokens. robust: see `robust_error`. mixed: half over all, half over ordinary tokens alone, each relative
        to its start.
        """
        inputs, targets = piece
        outputs, targets = self._scaled(self.student.block(inputs)), self._scaled(targets)
        error = (outputs.float() - targets.float()).square().sum(-1)
        if self.kind == "robust":
            return robust_error(error, start["per_token_ordinary"]).mean() / start["per_token_robust"]
        loss = error.mean() / start["per_token"]
        if self.kind == "mixed":
            ordinary = torch.where(massive_tokens(targets), 0, error).mean() / start["per_token_ordinary"]
            loss = (loss + ordinary) / 2
        return loss

    def held_out(self, rows: list[int], progress: Progress) -> dict[str, float]:
        """Errors of the block; the robust one is of tokens that are far off by what the start usually was."""
        usual = progress.start["per_token_ordinary"] if progress.start else self._errors(rows, None)["per_token_ordinary"]
        return self._errors(rows, usual)

    def score(self, held: dict[str, float], start: dict[str, float]) -> tuple[float, bool]:
        """Held-out loss; the error over ordinary tokens must not be above the start's."""
        by = {"plain": ("per_token",), "robust": ("per_token_robust",), "mixed": ("per_token", "per_token_ordinary")}[self.kind]
        loss = sum(held[key] / start[key] for key in by) / len(by)
        return loss, held["error_ordinary"] <= start["error_ordinary"]

    def stepped(self, step: Step, progress: Progress) -> None:
        """A block has one record, at its end."""

    @torch.no_grad()
    def _errors(self, rows: list[int], usual: float | None) -> dict[str, float]:
        """Errors of the block as it is on some sequences of each rank. usual: see `robust_error`; None leaves that one out."""
        error = BlockError()
        robust = torch.zeros((), dtype=torch.float64, device=self.device)
        pieces = list(torch.tensor(rows, dtype=torch.long).split(self.pieces)) if rows else []
        for inputs, targets in fetched((self.inputs, self.targets), pieces, self.device):
            outputs, targets = self._scaled(self.student.block(inputs)), self._scaled(targets)
            found = error.add(targets, outputs)
            if usual is not None:
                robust += robust_error(found, usual).sum()
        kinds = ("per_token", "per_token_ordinary", "per_token_robust")
        error.pool(self.task.group)
        (far,) = self.task.group.total([float(robust)])
        if not error.finite:
            return dict.fromkeys(("error", "error_ordinary", *kinds), math.inf)
        sums = (error.error, error.ordinary_error, far)
        per_token = {kind: max(total / error.tokens, 1e-30) for kind, total in zip(kinds, sums, strict=True)}
        return {"error": error.relative, "error_ordinary": error.relative_ordinary, **per_token}


def block_loop(
    task: BlockTask, student: Student, settings: "Training", section: str, seed: int, ema_decay: float | None = None
) -> TrainingLoop:
    """The training of one block. section: of the recipe, for messages. seed: of the data order. ema_decay: see `Job`."""
    length = task.quantized.shape[1]
    where = f"block {task.index}"
    job = Job(task.index, where, section, task.share, length, seed, task.device, task.group, ema_decay)
    return TrainingLoop(BlockObjective(task, student, settings), settings, job, task.keeper, task.monitor)


def train_block(loop: TrainingLoop, start: dict[str, Tensor]) -> BlockResult:
    """Trains one block. start: its tensors, which are returned as they are where no epoch was better.

    Facts: the errors at the start, which epoch won, and one record per epoch. Raises RunError when more steps than allowed were
    not finite.
    """
    best = loop.run()
    return BlockResult(start if best is None else best, loop.facts())
