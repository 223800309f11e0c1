"""Training of one block against the full-precision block's outputs.

The student's present weights enter its block, and gradients go back through the straight-through estimators once a step.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lbllm_cli.pipeline.block_loop import BlockTask, fetched
from lbllm_cli.pipeline.metrics import BlockError, massive_tokens, robust_error
from lbllm_cli.training.interfaces import Monitor, StateKeeper, Student
from lbllm_cli.training.loop import TrainingLoop

if TYPE_CHECKING:
    from lbllm_cli.recipe.training import Training


class Trainer(TrainingLoop):
    """Trains `student` so that its block turns the quantized stream into the targets.

    task: both streams. section: the recipe's, for messages. seed: data order. keeper: unfinished training. monitor: told how it
    goes.
    """

    errors = ("error", "error_ordinary", "per_token", "per_token_ordinary", "per_token_robust")

    def __init__(
        self,
        task: BlockTask,
        student: Student,
        settings: "Training",
        section: str,
        seed: int,
        keeper: StateKeeper,
        monitor: Monitor,
    ):
        rows, length, _ = task.quantized.data.shape
        where = f"block {task.index}"
        super().__init__(student, settings, section, rows, length, task.index, where, seed, keeper, monitor, task.device)
        self.student = student
        self.kind = settings.loss
        self.inputs, self.targets = task.quantized, task.targets

    def feed(self, pieces: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Inputs and targets."""
        return fetched((self.inputs, self.targets), pieces, self.device)

    def loss(self, piece: tuple[Tensor, ...]) -> Tensor:
        """Squared error of a micro-batch, 1 for the start's error on held-out sequences.

        plain: over all tokens. robust: see `robust_error`. mixed: half over all, half over ordinary tokens alone, each relative
        to its start.
        """
        inputs, targets = piece
        outputs = self.student.block(inputs)
        error = (outputs.float() - targets.float()).square().sum(-1)
        start = self.progress.start
        if self.kind == "robust":
            return robust_error(error, start["per_token_ordinary"]).mean() / start["per_token_robust"]
        loss = error.mean() / start["per_token"]
        if self.kind == "mixed":
            ordinary = torch.where(massive_tokens(targets), 0, error).mean() / start["per_token_ordinary"]
            loss = (loss + ordinary) / 2
        return loss

    def measure_start(self) -> None:
        """Held-out errors of the student as it begins, which the loss is relative to."""
        self.student.begin(0.0)
        usual = self._held_out(None)["per_token_ordinary"]
        self.progress.start = self._held_out(usual)

    def measure(self) -> tuple[float, dict[str, float], bool]:
        """Held-out loss; the error over ordinary tokens must not be above the start's."""
        start = self.progress.start
        held = self._held_out(start["per_token_ordinary"])
        by = {"plain": ("per_token",), "robust": ("per_token_robust",), "mixed": ("per_token", "per_token_ordinary")}[self.kind]
        loss = sum(held[key] / start[key] for key in by) / len(by)
        return loss, held, held["error_ordinary"] <= start["error_ordinary"]

    @torch.no_grad()
    def _held_out(self, usual: float | None) -> dict[str, float]:
        """Errors of the block as it is on the held-out sequences. usual: see `robust_error`; None leaves that one out."""
        error = BlockError()
        robust = 0.0
        pieces = list(torch.tensor(self.held).split(self.settings.micro_batch_size))
        for inputs, targets in fetched((self.inputs, self.targets), pieces, self.device):
            outputs = self.student.block(inputs)
            error.add(targets, outputs)
            if usual is not None:
                robust += float(robust_error((outputs.float() - targets.float()).square().sum(-1), usual).sum())
        kinds = ("per_token", "per_token_ordinary", "per_token_robust")
        if not error.finite:
            return dict.fromkeys(("error", "error_ordinary", *kinds), math.inf)
        tokens = len(self.held) * self.inputs.data.shape[1]
        sums = (error.error, error.ordinary_error, robust)
        per_token = {kind: max(total / tokens, 1e-30) for kind, total in zip(kinds, sums, strict=True)}
        return {"error": error.relative, "error_ordinary": error.relative_ordinary, **per_token}
