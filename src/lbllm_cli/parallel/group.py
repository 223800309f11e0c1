"""The one seam between stages and `torch.distributed`: processes ("ranks") that do one stage together.

Stages ask a `Group` and nothing else. `Alone` is a process by itself, to which every answer is its own; `Ranks` are several.
All ranks make the same calls in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lbllm_cli.parallel.shares import Share, share_of

T = TypeVar("T")


@dataclass
class Traffic:
    """What this rank handed over so far. bytes: of tensors, by operation. waited: seconds that it stood in host calls."""

    bytes: dict[str, int]
    waited: float = 0.0

    def copy(self) -> "Traffic":
        """As it is now."""
        return Traffic(dict(self.bytes), self.waited)

    def __sub__(self, before: "Traffic") -> "Traffic":
        kinds = {kind: count - before.bytes.get(kind, 0) for kind, count in self.bytes.items()}
        return Traffic(kinds, self.waited - before.waited)


class Pending(Protocol):
    """An operation under way."""

    def wait(self) -> None:
        """Until what it brings is there, for whoever computes on its device next."""


class Group(Protocol):
    """Ranks that work together. rank: this one's number. size: how many they are."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this rank writes checkpoints and speaks."""

    @property
    def node(self) -> "Group":
        """Those of this machine, to whom `begin_reduce` and `begin_spread` are cheap."""

    @property
    def traffic(self) -> Traffic:
        """So far, those of the node included."""

    def share(self, rows: int) -> Share:
        """This rank's part of some rows."""

    def facts(self, value: T) -> list[T]:
        """What every rank says, in order; Python values, small."""

    def told(self, ask: Callable[[], T]) -> T:
        """What the first rank finds; the others wait for it."""

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the ranks, in their order."""

    def some(self, flags: Sequence[bool]) -> list[bool]:
        """Whether any rank says so, of each."""

    def meet(self) -> None:
        """Until all are here."""

    def add(self, tensor: Tensor) -> None:
        """Sums a tensor over the ranks, in place."""

    def send(self, tensor: Tensor, rank: int) -> None:
        """Sums a tensor at one rank, in place; what the others have left of it means nothing."""

    def begin_reduce(self, tensor: Tensor, rank: int) -> Pending:
        """As `send`, among a node's ranks and then over nodes, while the caller goes on. rank: of the node's."""

    def begin_spread(self, tensor: Tensor, rank: int) -> Pending:
        """Gives a node's ranks what one of them has, in place, while the caller goes on."""

    def gathered(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Every rank's tensors, in order, each by its own names."""

    def norm(self, own: Tensor, common: Tensor) -> Tensor:
        """Norm over the `own` numbers of all ranks and the `common` ones that every rank has, both [n]: float32 []."""


class _Done:
    def wait(self) -> None:
        pass


class Alone:
    """One process."""

    rank, size = 0, 1
    first = True

    def __init__(self) -> None:
        self.traffic = Traffic({})

    @property
    def node(self) -> "Alone":
        """It."""
        return self

    def share(self, rows: int) -> Share:
        """All of them."""
        return share_of(rows, 0, 1)

    def facts(self, value: T) -> list[T]:
        """It says one thing."""
        return [value]

    def told(self, ask: Callable[[], T]) -> T:
        """What it finds."""
        return ask()

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Its own."""
        return list(numbers)

    def some(self, flags: Sequence[bool]) -> list[bool]:
        """Its own."""
        return list(flags)

    def meet(self) -> None:
        """Nobody is waited for."""

    def add(self, tensor: Tensor) -> None:
        """The sum is what it has."""

    def send(self, tensor: Tensor, rank: int) -> None:
        """It has it."""

    def begin_reduce(self, tensor: Tensor, rank: int) -> Pending:
        """It has it."""
        return _Done()

    def begin_spread(self, tensor: Tensor, rank: int) -> Pending:
        """It has it."""
        return _Done()

    def gathered(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Its own."""
        return [tensors]

    def norm(self, own: Tensor, common: Tensor) -> Tensor:
        """Of all numbers."""
        return torch.cat([own, common]).norm()


ALONE = Alone()


def merged(group: Group, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All ranks' tensors, of which each has others."""
    return {name: tensor for found in group.gathered(tensors) for name, tensor in found.items()}


def stacked(group: Group, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors [n, ...] whose rows the ranks have in turn, whole; by names that every rank has."""
    found = group.gathered(tensors)
    return {name: torch.cat([part[name] for part in found]) if len(found) > 1 else tensors[name] for name in tensors}


def agree(group: Group, value: dict[str, Any]) -> list[str]:
    """What differs between ranks, a line for each key with the first two answers that do; nothing where they agree."""
    said = group.facts(value)
    lines = []
    for key in dict.fromkeys(key for one in said for key in one):
        answers = [one.get(key, "absent") for one in said]
        other = next((rank for rank, answer in enumerate(answers) if answer != answers[0]), None)
        if other is not None:
            lines.append(f"  {key}: {answers[0]} on rank 0, {answers[other]} on rank {other}")
    return lines
