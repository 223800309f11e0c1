"""The last phase of stages 2 and 3: the whole model against the teacher's next-token distributions.

Not in LBLLM: blocks trained one by one see neither each other's errors nor what the model predicts. Codes stay as they are.
"""

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lbllm_cli.end_to_end.loss import distillation_loss
from lbllm_cli.end_to_end.student import WholeStudent
from lbllm_cli.models.model import FINAL_NORM, block_prefix
from lbllm_cli.pipeline.block_loop import HiddenStream, fetched
from lbllm_cli.pipeline.checkpoint import Checkpoint, StageWriter
from lbllm_cli.training.agreement import POSITIONS, Agreement, log_probabilities
from lbllm_cli.training.loop import TrainingLoop
from lbllm_cli.training.state import TrainingState

if TYPE_CHECKING:
    from lbllm_cli.pipeline.reporter import Reporter
    from lbllm_cli.recipe.training import EndToEnd

# Lines of log and records of a run, beside those of its epochs.
_RECORDS = 32


class EndToEndTrainer(TrainingLoop):
    """Trains a whole student towards the teacher's distributions.

    tokens: int64 [rows, length]. states: the teacher's last hidden states on them. section: of the recipe, for messages.
    """

    errors = ("error", "kl", "top1", "perplexity")

    def __init__(
        self,
        student: WholeStudent,
        tokens: Tensor,
        states: HiddenStream,
        settings: "EndToEnd",
        section: str,
        seed: int,
        keeper: TrainingState,
        reporter: "Reporter",
        device: torch.device,
    ):
        rows, length = tokens.shape
        super().__init__(student, settings, section, rows, length, 0, "the whole model", seed, keeper, reporter, device)
        self.student, self.tokens, self.states, self.reporter = student, tokens, states, reporter
        self.temperature, self.share = settings.temperature, settings.next_token

    def feed(self, pieces: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Tokens and the teacher's states."""
        for rows, (states,) in zip(pieces, fetched((self.states,), pieces, self.device), strict=True):
            yield self.tokens[rows].to(self.device), states

    def loss(self, piece: tuple[Tensor, ...]) -> Tensor:
        """See `ops.distillation`; every position but the last predicts."""
        tokens, states = piece
        with torch.no_grad():
            teacher = self.student.teacher(states[:, :-1]).flatten(0, 1)
        student = self.student(tokens)[:, :-1].flatten(0, 1)
        head = self.student.head
        return distillation_loss(student, teacher, head, tokens[:, 1:].flatten(), self.temperature, self.share)

    def _step(self, batch: Tensor, feed: Iterator[tuple[Tensor, ...]]) -> float:
        began = time.monotonic()
        loss = super()._step(batch, feed)
        recent = self.progress.recent
        recent.append(loss)
        self.progress.recent_seconds += time.monotonic() - began
        step, steps = self.progress.epoch * self.steps + self.progress.step + 1, self.settings.epochs * self.steps
        if step * _RECORDS // steps != (step - 1) * _RECORDS // steps or step == steps:
            rows = self.progress.epoch * len(self.rows) + min((self.progress.step + 1) * self.settings.batch_size, len(self.rows))
            # Steps that were skipped are counted elsewhere; one must not take the others' mean with it.
            finite = [value for value in recent if math.isfinite(value)]
            facts = {"loss": sum(finite) / len(finite) if finite else None, "tokens": rows * self.length}
            self.reporter.end_steps(step, steps, len(recent), self.progress.recent_seconds, facts)
            self.progress.recent, self.progress.recent_seconds = [], 0.0
        return loss

    @torch.no_grad()
    def _held_out(self) -> dict[str, float]:
        """The loss, KL divergence, top-1 agreement and perplexity on the held-out sequences."""
        agreement, total = Agreement(self.length), 0.0
        head = self.student.head
        for tokens, states in self.feed(list(torch.tensor(self.held).split(1))):
            student, teacher = self.student(tokens)[0, :-1], self.student.teacher(states)[0, :-1]
            wanted = tokens[0, 1:]
            total += float(distillation_loss(student, teacher, head, wanted, self.temperature, self.share))
            for start in range(0, len(wanted), POSITIONS):
                piece = slice(start, start + POSITIONS)
                teachers, students = (log_probabilities(linear(x[piece], head)) for x in (teacher, student))
                agreement.add(start, teachers, students, wanted[piece])
        kl, perplexity = agreement.mean_divergence, agreement.perplexity
        # A student that is the teacher has none, and later losses are divided by this one.
        return {"error": max(total / len(self.held), 1e-30), "kl": kl, "top1": agreement.top1, "perplexity": perplexity}

    def measure_start(self) -> None:
        """The held-out loss that others are relative to."""
        self.student.begin(0.0)
        self.progress.start = self._held_out()
        self.reporter.note(f"start: {_described(self.progress.start)}, on held-out sequences")

    def measure(self) -> tuple[float, dict[str, float], bool]:
        """Held-out loss over the start's."""
        held = self._held_out()
        self.reporter.note(f"epoch {self.progress.epoch + 1}: {_described(held)}")
        return held["error"] / self.progress.start["error"], held, math.isfinite(held["error"])


def _described(held: dict[str, float]) -> str:
    return f"loss {held['error']:.4f}, KL {held['kl']:.4f}, top-1 {held['top1']:.1%}, perplexity {held['perplexity']:.2f}"


def train_whole(trainer: EndToEndTrainer, parent: Checkpoint, writer: StageWriter) -> dict[str, Any]:
    """Trains and writes all blocks of the stage; returns what to record.

    The parent's own tensors are written where no epoch was better. Raises RunError when more steps than allowed were not finite.
    """
    with torch.enable_grad():
        changed = trainer.run() or {}
    # A run that is killed while the blocks are written does not train again.
    trainer.save()
    for index in range(len(trainer.student.blocks)):
        own = {name: tensor for name, tensor in changed.items() if name.startswith(block_prefix(index))}
        writer.write_block(index, {**parent.read_block(index), **own})
        writer.commit(index)
    outer = parent.read_outer() | {name: changed[name] for name in (FINAL_NORM,) if name in changed}
    if outer:
        writer.write_outer(outer)
    return trainer.facts()
