"""Whom a fit may ask: who is told how it goes, and where unfinished work is kept."""

from typing import Any, NoReturn, Protocol

from torch import Tensor


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
