"""Steps, schedule, selection and resume of everything that trains. No files, no formats.

A step: the student is made ready, micro-batches add up gradients, AdamW moves the masters. After every epoch the student is
scored on held-out sequences; the best state wins, and the start is one of the candidates.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lbllm_cli.core import interrupt
from lbllm_cli.core.errors import Interrupted, RunError
from lbllm_cli.core.splits import data_seed
from lbllm_cli.parallel.group import ALONE, Group
from lbllm_cli.parallel.shares import Share
from lbllm_cli.pipeline.interfaces import Monitor, StateKeeper
from lbllm_cli.pipeline.training_state import ALIKE
from lbllm_cli.runtime.backend import backend_of, on_device
from lbllm_cli.training.exchange import Exchange
from lbllm_cli.training.interfaces import Objective, Step
from lbllm_cli.training.kept import by_owner, check_kept, kept_tensors, put_back
from lbllm_cli.training.order import Order
from lbllm_cli.training.progress import Progress, kept_progress
from lbllm_cli.training.running_mean import RunningMean
from lbllm_cli.training.tally import Tally, store
from lbllm_cli.training.update import Update

if TYPE_CHECKING:
    from lbllm_cli.recipe.training import Schedule

_LAST_RATE = 0.05
# Steps whose numbers may still be on their way from a GPU: it has done the one before the last by the time they are asked for.
_BEHIND = 2


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the top learning rate in step `step` of `steps`: linear up over the first `warmup` of them, cosine down to 5 %.

    0, 100, 0.05 -> 0.2; 4 -> 1.0; 99 -> 0.05.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    share = (step - rising + 1) / max(1, steps - rising)
    return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Job:
    """What a training is of.

    index: a number that the seed of the data order and the kept state carry. where: the index in words. section: of the recipe,
    for messages. share: this rank's part of the sequences, of `length` tokens each. group: of ranks that train it together.
    ema_decay: of the running mean that an epoch is scored and kept as; None: the state of its last step.
    """

    index: int
    where: str
    section: str
    share: Share
    length: int
    seed: int
    device: torch.device
    group: Group = ALONE
    ema_decay: float | None = None


class TrainingLoop:
    """Steps, schedule, selection of the best epoch, resume.

    objective: what is trained, and towards what. settings: of the recipe. keeper: unfinished training. monitor: told how it goes.
    """

    def __init__(self, objective: Objective, settings: "Schedule", job: Job, keeper: StateKeeper, monitor: Monitor):
        self.objective, self.trained = objective, objective.student
        self.settings, self.job, self.keeper, self.monitor = settings, job, keeper, monitor
        self.group = job.group
        self.order = Order(job.share, job.group, settings, data_seed(job.seed, job.index))
        self.steps = self.order.steps
        self.exchange = Exchange(self.trained, job.group)
        self.update = Update(self.trained, self.exchange, job.device)
        parameters = [p for group in self.update.groups for p in group.params]
        self.mean = None if job.ema_decay is None else RunningMean(parameters, job.ema_decay)
        self.progress = Progress(job.index)
        self.backend = backend_of(job.device)
        self.tally = Tally(job.device, settings.clip)
        self._untold: deque[tuple[Step, Callable[[], Tensor]]] = deque()
        self.best: dict[str, Tensor] | None = None

    def run(self) -> dict[str, Tensor] | None:
        """The best epoch's tensors, or None when no epoch was better than the start; `progress` tells how it went."""
        self._resume()
        self.tally.load(self.progress)
        if not self.progress.start:
            self.measure_start()
        if not math.isfinite(self.progress.start["error"]):
            raise RunError(f"{self.job.where}: the outputs of its start are not finite; set model.dtype: float32")
        while self.progress.epoch < self.settings.epochs:
            self._epoch()
        return self.best

    def measure_start(self) -> None:
        """Held-out errors of the student as it begins, which later ones are relative to."""
        self.progress.start = self._held_out(0.0)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """What an epoch is scored and kept as: the running mean of what is trained, where there is one."""
        if self.mean is None:
            yield
            return
        with self.mean.shown():
            self.trained.resumed()
            yield
        self.trained.resumed()

    def _held_out(self, done: float) -> dict[str, float]:
        """Held-out errors of the present student."""
        self.trained.begin(done)
        found = self.objective.held_out(self.order.held, self.progress)
        # A rank that has none of these sequences has not run with the weights that were sent to it.
        self.trained.settle()
        return found

    def facts(self) -> dict[str, Any]:
        """How it went: errors at the start and of the best epoch, which one that was, and one record per epoch."""
        progress = self.progress
        return {
            "before": progress.start,
            "after": progress.epochs[progress.best - 1]["held_out"] if progress.best else progress.start,
            "best_epoch": progress.best,
            "skipped": progress.skipped,
            "epochs": progress.epochs,
        }

    def _epoch(self) -> None:
        progress = self.progress
        began = time.monotonic()
        batches = self.order.batches(progress.epoch)[progress.step :]
        pieces = [micro for batch in batches for micro in self.order.pieces(batch)]
        feed = self.objective.feed(pieces)
        for batch in batches:
            self._pause()
            began = self._count(began)
            self.monitor.tick(f"epoch {progress.epoch + 1}/{self.settings.epochs}, step {progress.step + 1}/{self.steps}")
            self.step(batch, feed, self.order.whole(progress.step))
            progress.step += 1
        self._count(began)
        self._tell(0)
        self._score()
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss_sum = progress.norm_sum = progress.norm_max = progress.seconds = 0.0
        progress.taken = 0
        self.tally.load(progress)

    def _count(self, began: float) -> float:
        now = time.monotonic()
        self.progress.seconds += now - began
        return now

    def _pause(self) -> None:
        """Between two steps: saves when it is time to, or a signal came; to any rank, of which all save the same step."""
        signal = Interrupted("another rank was stopped; run the same command again to resume")
        try:
            interrupt.check()
            stopped = False
        except Interrupted as found:
            signal, stopped = found, True
        stopped, due = self.group.some([stopped, self.keeper.due()])
        if stopped or due:
            self.save()
        if stopped:
            raise signal

    def step(self, batch: Tensor, feed: Iterator[tuple[Tensor, ...]], whole: int) -> None:
        """One optimizer step over the rows of `batch` and of other ranks, `whole` in all. feed: what the objective has for its
        micro-batches."""
        began = time.monotonic()
        self.trained.begin(self._done())
        loss = torch.zeros((), device=self.job.device)
        micro = self.order.pieces(batch)
        for number in range(len(micro)):
            piece = next(feed)
            part = self.objective.loss(piece, self.progress.start) * (piece[0].shape[0] / whole)
            if number == len(micro) - 1:
                self.exchange.last()
            part.backward()
            loss += part.detach()
        self.exchange.weights_done()
        self.trained.backward()
        self.exchange.copies_done()
        self.group.add(loss)
        self.update.take(loss, self.tally, self._factor())
        if self.mean is not None:
            self.mean.add(self._number())
        transfers = self.backend.transfers(self.job.device)
        values = self.tally.values
        self._untold.append((self._step(time.monotonic() - began), transfers.later(values).wait if transfers else lambda: values))
        self._tell(_BEHIND if transfers else 0)

    def _tell(self, behind: int) -> None:
        """Says what steps came to, of all but the last `behind`. Raises RunError where too many were skipped."""
        while len(self._untold) > behind:
            step, values = self._untold.popleft()
            before = self.progress.skipped
            loss, norm = store(values().tolist(), self.progress)
            if self.progress.skipped > before:
                self._check_skipped(step.number, loss, norm)
            self.objective.stepped(replace(step, loss=loss), self.progress)

    def _step(self, seconds: float) -> Step:
        """The present step, whose loss is not known yet."""
        tokens = self.order.read(self.progress.epoch, self.progress.step) * self.job.length
        return Step(math.nan, seconds, self._number(), self.settings.epochs * self.steps, tokens)

    def _number(self) -> int:
        """The present step, of all steps, from 1."""
        return self.progress.epoch * self.steps + self.progress.step + 1

    def _factor(self) -> float:
        """Share of the top learning rates in the present step."""
        return rate_factor(self._number() - 1, self.settings.epochs * self.steps, self.settings.warmup)

    def _done(self) -> float:
        """Share of all steps that are done."""
        return (self._number() - 1) / (self.settings.epochs * self.steps)

    def _check_skipped(self, number: int, loss: float, norm: float) -> None:
        skipped, section = self.progress.skipped, self.job.section
        epoch, step = divmod(number - 1, self.steps)
        if skipped > self.settings.max_skipped:
            raise RunError(
                f"{self.job.where}, epoch {epoch + 1}, step {step + 1}: loss {loss:.3g}, gradient norm {norm:.3g}; {skipped} "
                f"steps were not finite, {section}.max_skipped allows {self.settings.max_skipped}; lower {section}.lr_levels and "
                "the rates beside it, or set model.dtype: float32"
            )

    def _score(self) -> None:
        """End of an epoch: held-out error, record, and whether this is the best state so far."""
        progress = self.progress
        with self._shown():
            held = self._held_out(self._done())
            loss, allowed = self.objective.score(held, progress.start)
            if loss < progress.best_loss and allowed:
                progress.best, progress.best_loss = progress.epoch + 1, loss
                self.best = self.trained.snapshot()
            facts = self.trained.facts()
        taken = max(1, progress.taken)
        tokens = self.order.every * self.job.length
        progress.epochs.append(
            {
                "loss": progress.loss_sum / taken,
                "held_out_loss": loss,
                "held_out": held,
                **facts,
                "lr": {
                    group.kind: own["lr"] / (group.unit or 1.0)  # a linear of zeros is trained at a rate of 0
                    for own, group in zip(self.update.optimizer.param_groups, self.update.groups, strict=True)
                },
                "gradient_norm": progress.norm_sum / taken,
                "gradient_norm_max": progress.norm_max,
                "skipped": progress.skipped,
                "tokens_per_second": round(tokens / max(progress.seconds, 1e-9)),
                **self.monitor.memory(),
            }
        )

    def _parameters(self) -> dict[str, nn.Parameter]:
        """By the names that they are kept under."""
        copies = {id(p): number for number, p in enumerate(self.exchange.copies)}
        every = ((g, i, p) for g, group in enumerate(self.update.groups) for i, p in enumerate(group.params))
        return {f"copy.{copies[id(p)]}" if id(p) in copies else f"{g}.{i}": p for g, i, p in every}

    def save(self) -> None:
        """Keeps the present state, from which a resumed run goes on."""
        self._tell(0)
        tensors = kept_tensors(self._parameters(), self.update.optimizer, self.mean, self.best)
        kept = {name: tensor for name, tensor in tensors.items() if self.group.first or not name.startswith(ALIKE)}
        self.keeper.save(kept, asdict(self.progress))

    def _resume(self) -> None:
        kept = self.keeper.load(self.progress.block)
        if kept is None:
            return
        tensors, facts = kept
        found, parameters = by_owner(tensors), self._parameters()
        try:
            self.progress = kept_progress(facts, self.settings.epochs, self.steps, self.objective.errors)
            check_kept(found, parameters, self.trained.snapshot(), self.mean is not None)
        except ValueError as error:
            self.keeper.refuse(str(error))
        self.best = {name: on_device(tensor, self.job.device) for name, tensor in found.pop("best", {}).items()} or None
        put_back(found, parameters, self.update.optimizer, self.mean)
        self.trained.resumed()
