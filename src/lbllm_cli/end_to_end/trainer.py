"""What the end-to-end phase trains towards: the whole model against the teacher's next-token distributions.

Not in LBLLM: blocks trained one by one see neither each other's errors nor what the model predicts.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lbllm_cli.end_to_end.loss import distillation_loss
from lbllm_cli.end_to_end.student import WholeStudent
from lbllm_cli.pipeline.streams import HiddenStream, fetched
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.training.agreement import POSITIONS, Agreement, Predictions
from lbllm_cli.training.interfaces import Step
from lbllm_cli.training.progress import Progress

if TYPE_CHECKING:
    from lbllm_cli.pipeline.reporter import Reporter
    from lbllm_cli.recipe.training import EndToEnd

# Lines of log and records of a run, beside those of its epochs.
_RECORDS = 32


class EndToEndObjective:
    """That a whole student predicts what the teacher does.

    tokens: int64 [rows, length]. states: the teacher's last hidden states on them.
    """

    errors: ClassVar[tuple[str, ...]] = ("error", "kl", "top1", "perplexity")

    def __init__(
        self, student: WholeStudent, tokens: Tensor, states: HiddenStream, settings: "EndToEnd", reporter: "Reporter"
    ):
        self.student, self.tokens, self.states, self.reporter = student, tokens, states, reporter
        self.temperature, self.share, self.device = settings.temperature, settings.next_token, student.head.weight.device

    def feed(self, pieces: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Tokens and the teacher's states."""
        transfers = backend_of(self.device).transfers(self.device)
        for rows, (states,) in zip(pieces, fetched((self.states,), pieces, self.device), strict=True):
            tokens = self.tokens[rows]
            yield tokens if transfers is None else transfers.small(tokens), states

    def loss(self, piece: tuple[Tensor, ...], start: dict[str, float]) -> Tensor:
        """See `end_to_end.loss`; every position but the last predicts."""
        tokens, states = piece
        with torch.no_grad():
            teacher = self.student.teacher(states[:, :-1]).flatten(0, 1)
        student = self.student(tokens)[:, :-1].flatten(0, 1)
        return distillation_loss(student, teacher, self.student.head, tokens[:, 1:].flatten(), self.temperature, self.share)

    def stepped(self, step: Step, progress: Progress) -> None:
        """A line and a record now and then, of the steps since the one before."""
        recent = progress.recent
        recent.append(step.loss)
        progress.recent_seconds += step.seconds
        number, steps = step.number, step.steps
        if number * _RECORDS // steps != (number - 1) * _RECORDS // steps or number == steps:
            # Steps that were skipped are counted elsewhere; one must not take the others' mean with it.
            finite = [value for value in recent if math.isfinite(value)]
            facts = {"loss": sum(finite) / len(finite) if finite else None, "tokens": step.tokens}
            self.reporter.end_steps(number, steps, len(recent), progress.recent_seconds, facts)
            progress.recent, progress.recent_seconds = [], 0.0

    @torch.no_grad()
    def held_out(self, rows: list[int], progress: Progress) -> dict[str, float]:
        """The loss, KL divergence, top-1 agreement and perplexity on some sequences, which are said as well."""
        agreement, total, group = Agreement(self.tokens.shape[1]), 0.0, self.reporter.group
        head = self.student.head
        for tokens, states in self.feed([torch.tensor([row]) for row in rows]):
            student, teacher = self.student(tokens)[0, :-1], self.student.teacher(states)[0, :-1]
            wanted = tokens[0, 1:]
            total += float(distillation_loss(student, teacher, head, wanted, self.temperature, self.share))
            for start in range(0, len(wanted), POSITIONS):
                piece = slice(start, start + POSITIONS)
                teachers, students = (Predictions(head(x[piece])) for x in (teacher, student))
                agreement.add(start, teachers, students, wanted[piece])
        agreement.pool(group)
        total, count = group.total([total, len(rows)])
        kl, perplexity = agreement.mean_divergence, agreement.perplexity
        # A student that is the teacher has none, and later losses are divided by this one.
        held = {"error": max(total / count, 1e-30), "kl": kl, "top1": agreement.top1, "perplexity": perplexity}
        when, tail = (f"epoch {progress.epoch + 1}", "") if progress.start else ("start", ", on held-out sequences")
        self.reporter.note(f"{when}: {_described(held)}{tail}")
        return held

    def score(self, held: dict[str, float], start: dict[str, float]) -> tuple[float, bool]:
        """Held-out loss over the start's."""
        return held["error"] / start["error"], math.isfinite(held["error"])


def _described(held: dict[str, float]) -> str:
    return f"loss {held['error']:.4f}, KL {held['kl']:.4f}, top-1 {held['top1']:.1%}, perplexity {held['perplexity']:.2f}"
