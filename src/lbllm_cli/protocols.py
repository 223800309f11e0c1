"""What the training of a block asks of others: the student, who is told how it goes, where unfinished work is kept."""

from typing import Any, Protocol

from torch import Tensor

from lbllm_cli.model import Block


class Student(Protocol):
    """What is trained."""

    block: Block

    def groups(self) -> list[dict[str, Any]]:
        """AdamW groups: `params`, their `kind`, `top`, the learning rate at the top of the schedule, and `unit`, their scale."""

    def begin(self, progress: float) -> None:
        """Puts the present weights into the block. progress: share of the steps done, 0 to 1."""

    def backward(self) -> None:
        """Carries the gradients of the block's weights to the parameters."""

    def constrain(self) -> None:
        """After a step."""

    def snapshot(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""

    def resumed(self) -> None:
        """After the parameters were replaced by saved ones."""

    def facts(self) -> dict[str, float]:
        """What an epoch's record says about the present state."""


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

    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
