"""Steps, schedule, selection and resume of everything that trains. No files, no formats.

A step: the student is made ready, micro-batches add up gradients, AdamW moves the masters. After every epoch the student is
scored on held-out sequences; the best state wins, and the start is one of the candidates.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lbllm_cli.core import interrupt
from lbllm_cli.core.errors import Interrupted, RunError
from lbllm_cli.core.splits import data_seed, held_out_rows
from lbllm_cli.pipeline.interfaces import Monitor, StateKeeper
from lbllm_cli.training.interfaces import Objective, Step
from lbllm_cli.training.progress import Progress, check_kept, kept_progress

if TYPE_CHECKING:
    from lbllm_cli.recipe.training import Schedule

_LAST_RATE = 0.05
# The usual gradient norm follows the present one by this share a step.
_FOLLOW = 0.1


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
    for messages. shape: sequences, and tokens in one.
    """

    index: int
    where: str
    section: str
    shape: tuple[int, int]
    seed: int
    device: torch.device


class TrainingLoop:
    """Steps, schedule, selection of the best epoch, resume.

    objective: what is trained, and towards what. settings: of the recipe. keeper: unfinished training. monitor: told how it goes.
    """

    def __init__(self, objective: Objective, settings: "Schedule", job: Job, keeper: StateKeeper, monitor: Monitor):
        self.objective, self.trained = objective, objective.student
        self.settings, self.job, self.keeper, self.monitor = settings, job, keeper, monitor
        rows = job.shape[0]
        self.seed = data_seed(job.seed, job.index)
        held = held_out_rows(rows, settings.held_out)
        # Spread over the data, which may be ordered by source.
        self.held = [round((i + 0.5) * rows / held - 0.5) for i in range(held)]
        self.rows = sorted(set(range(rows)) - set(self.held))
        self.steps = -(-len(self.rows) // settings.batch_size)
        self.groups = self.trained.groups()
        options = [{"params": group.params, "lr": group.top} for group in self.groups]
        self.optimizer = torch.optim.AdamW(options, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
        self.progress = Progress(job.index)
        self.best: dict[str, Tensor] | None = None

    def run(self) -> dict[str, Tensor] | None:
        """The best epoch's tensors, or None when no epoch was better than the start; `progress` tells how it went."""
        self._resume()
        if not self.progress.start:
            self.measure_start()
        if not math.isfinite(self.progress.start["error"]):
            raise RunError(f"{self.job.where}: the outputs of its start are not finite; set model.dtype: float32")
        while self.progress.epoch < self.settings.epochs:
            self._epoch()
        return self.best

    def measure_start(self) -> None:
        """Held-out errors of the student as it begins, which later ones are relative to."""
        self.trained.begin(0.0)
        self.progress.start = self.objective.held_out(self.held, self.progress)

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

    def _batches(self) -> list[Tensor]:
        """Rows of each step of the present epoch."""
        generator = torch.Generator().manual_seed((self.seed << 10) + self.progress.epoch)
        order = torch.tensor(self.rows)[torch.randperm(len(self.rows), generator=generator)]
        return list(order.split(self.settings.batch_size))

    def _epoch(self) -> None:
        progress = self.progress
        began = time.monotonic()
        batches = self._batches()[progress.step :]
        pieces = [micro for batch in batches for micro in batch.split(self.settings.micro_batch_size)]
        feed = self.objective.feed(pieces)
        for batch in batches:
            self._pause()
            began = self._count(began)
            self.monitor.tick(f"epoch {progress.epoch + 1}/{self.settings.epochs}, step {progress.step + 1}/{self.steps}")
            self.step(batch, feed)
            progress.step += 1
        self._count(began)
        self._score()
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss_sum = progress.norm_sum = progress.norm_max = progress.seconds = 0.0
        progress.taken = 0

    def _count(self, began: float) -> float:
        now = time.monotonic()
        self.progress.seconds += now - began
        return now

    def _pause(self) -> None:
        """Between two steps: saves when it is time to, or a signal came."""
        try:
            interrupt.check()
        except Interrupted:
            self.save()
            raise
        if self.keeper.due():
            self.save()

    def step(self, batch: Tensor, feed: Iterator[tuple[Tensor, ...]]) -> float:
        """One optimizer step over the rows of `batch`; returns its loss. feed: what the objective has for its micro-batches."""
        began = time.monotonic()
        self.trained.begin(self._done())
        loss = torch.zeros((), device=self.job.device)
        for _ in batch.split(self.settings.micro_batch_size):
            piece = next(feed)
            part = self.objective.loss(piece, self.progress.start) * (piece[0].shape[0] / len(batch))
            part.backward()
            loss += part.detach()
        self.trained.backward()
        found = float(loss)
        self._update(found)
        self.objective.stepped(self._taken(found, time.monotonic() - began), self.progress)
        return found

    def _taken(self, loss: float, seconds: float) -> Step:
        progress = self.progress
        rows = progress.epoch * len(self.rows) + min((progress.step + 1) * self.settings.batch_size, len(self.rows))
        number, steps = progress.epoch * self.steps + progress.step + 1, self.settings.epochs * self.steps
        return Step(loss, seconds, number, steps, rows * self.job.shape[1])

    def _done(self) -> float:
        """Share of all steps that are done."""
        return (self.progress.epoch * self.steps + self.progress.step) / (self.settings.epochs * self.steps)

    def _update(self, loss: float) -> None:
        """The one place where gradients become a step: they are complete here, and nothing is between here and the masters."""
        progress = self.progress
        gradients = [(group.unit, p.grad) for group in self.groups for p in group.params if p.grad is not None]
        norms = torch.stack([grad.norm() * unit for unit, grad in gradients])
        norm = float(norms.norm())
        if math.isfinite(loss) and math.isfinite(norm):
            done, whole = progress.epoch * self.steps + progress.step, self.settings.epochs * self.steps
            factor = rate_factor(done, whole, self.settings.warmup)
            for own, group in zip(self.optimizer.param_groups, self.groups, strict=True):
                own["lr"] = group.top * factor
            limit = self.settings.clip * progress.usual_norm if progress.usual_norm else math.inf
            if norm > limit:
                for _, grad in gradients:
                    grad.mul_(limit / norm)
            taken = min(norm, limit)
            progress.usual_norm = (
                taken if not progress.usual_norm else progress.usual_norm + _FOLLOW * (taken - progress.usual_norm)
            )
            self.optimizer.step()
            self.trained.constrain()
            progress.taken += 1
            progress.loss_sum += loss
            progress.norm_sum += norm
            progress.norm_max = max(progress.norm_max, norm)
        else:
            progress.skipped += 1
            self._check_skipped(loss, norm)
        self.optimizer.zero_grad(set_to_none=True)

    def _check_skipped(self, loss: float, norm: float) -> None:
        progress = self.progress
        where, section = f"{self.job.where}, epoch {progress.epoch + 1}, step {progress.step + 1}", self.job.section
        if progress.skipped > self.settings.max_skipped:
            raise RunError(
                f"{where}: loss {loss:.3g}, gradient norm {norm:.3g}; {progress.skipped} steps were not finite, "
                f"{section}.max_skipped allows {self.settings.max_skipped}; lower {section}.lr_levels and the rates beside "
                "it, or set model.dtype: float32"
            )

    def _score(self) -> None:
        """End of an epoch: held-out error, record, and whether this is the best state so far."""
        progress = self.progress
        self.trained.begin(self._done())
        held = self.objective.held_out(self.held, progress)
        loss, allowed = self.objective.score(held, progress.start)
        if loss < progress.best_loss and allowed:
            progress.best, progress.best_loss = progress.epoch + 1, loss
            self.best = self.trained.snapshot()
        taken = max(1, progress.taken)
        tokens = len(self.rows) * self.job.shape[1]
        progress.epochs.append(
            {
                "loss": progress.loss_sum / taken,
                "held_out_loss": loss,
                "held_out": held,
                **self.trained.facts(),
                "lr": {
                    group.kind: own["lr"] / group.unit
                    for own, group in zip(self.optimizer.param_groups, self.groups, strict=True)
                },
                "gradient_norm": progress.norm_sum / taken,
                "gradient_norm_max": progress.norm_max,
                "skipped": progress.skipped,
                "tokens_per_second": round(tokens / max(progress.seconds, 1e-9)),
                **self.monitor.memory(),
            }
        )

    def _parameters(self) -> dict[str, Tensor]:
        return {f"{g}.{i}": p for g, group in enumerate(self.groups) for i, p in enumerate(group.params)}

    def save(self) -> None:
        """Keeps the present state, from which a resumed run goes on."""
        tensors = {f"best/{name}": tensor for name, tensor in (self.best or {}).items()}
        for name, parameter in self._parameters().items():
            tensors[f"{name}/value"] = parameter.detach()
            tensors |= {f"{name}/{key}": moment for key, moment in self.optimizer.state[parameter].items()}
        tensors |= {f"follower.{index}/value": tensor for index, tensor in enumerate(self.trained.followers())}
        self.keeper.save(tensors, asdict(self.progress))

    def _resume(self) -> None:
        kept = self.keeper.load(self.progress.block)
        if kept is None:
            return
        tensors, facts = kept
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            owner, _, name = key.partition("/")
            found.setdefault(owner, {})[name] = tensor.to(self.job.device)
        try:
            self.progress = kept_progress(facts, self.settings.epochs, self.steps, self.objective.errors)
            check_kept(found, self._parameters(), self.trained.followers(), self.trained.snapshot())
        except ValueError as error:
            self.keeper.refuse(str(error))
        self.best = found.get("best")
        for name, parameter in self._parameters().items():
            with torch.no_grad():
                parameter.copy_(found[name].pop("value"))
            self.optimizer.state[parameter].update(found[name])
        for index, tensor in enumerate(self.trained.followers()):
            with torch.no_grad():
                tensor.copy_(found[f"follower.{index}"]["value"])
        self.trained.resumed()
