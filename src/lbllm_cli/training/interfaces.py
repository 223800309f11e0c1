"""What training asks of others: the student, who is told how it goes, where unfinished work is kept."""

from typing import Any, NoReturn, Protocol

from torch import Tensor

from lbllm_cli.models.model import Block


class Trained(Protocol):
    """What is trained."""

    def groups(self) -> list[dict[str, Any]]:
        """AdamW groups: `params`, their `kind`, `top`, the learning rate at the top of the schedule, and `unit`, their scale."""

    def begin(self, progress: float) -> None:
        """Before a step, and before it is measured: it runs with the present parameters. progress: share of the steps done."""

    def backward(self) -> None:
        """After the backward passes of a step: carries gradients to the parameters where autograd has not."""

    def constrain(self) -> None:
        """After a step."""

    def snapshot(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""

    def followers(self) -> list[Tensor]:
        """What a step moves without training it: kept and replaced with the parameters."""

    def resumed(self) -> None:
        """After the parameters were replaced by saved ones."""

    def facts(self) -> dict[str, float]:
        """What an epoch's record says about the present state."""


class Student(Trained, Protocol):
    """A block in training."""

    block: Block


class Monitor(Protocol):
    """Who is told how training goes."""

    def tick(self, text: str) -> None:
        """Where training is."""

    def memory(self) -> dict[str, int | None]:
        """Peak memory so far, for the record of an epoch."""


class StateKeeper(Protocol):
    """Where an unfinished block's training is kept."""

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replaces what was kept."""

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept of block `index`, if anything."""

    def refuse(self, reason: str) -> NoReturn:
        """Raises UsageError: what was kept is not what can be gone on from."""

    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
