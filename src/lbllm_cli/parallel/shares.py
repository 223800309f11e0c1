"""Who has what: sequences in one piece for each rank, work by its cost, the sequences of a training step, places in a buffer."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """A rank's part of some rows: `start` to `stop` of `rows`. What is numbered within it begins with 0."""

    rows: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        """Of all rows."""
        return slice(self.start, self.stop)

    def own(self, rows: Iterable[int]) -> list[int]:
        """Those of some rows that are in this part, by their number in it."""
        return [row - self.start for row in rows if self.start <= row < self.stop]

    def within(self, first: int, end: int) -> tuple[int, int]:
        """What this part has of the rows `first` to `end`, by their numbers in it: 4..8 of 0..6 -> (0, 2)."""
        low, high = (min(max(row, self.start), self.stop) - self.start for row in (first, end))
        return low, high

    def parted(self, last: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """What this part has of all rows but the `last` ones, and of these: 4..8 of 8, the last 2 -> (0, 2), (2, 4)."""
        return self.within(0, self.rows - last), self.within(self.rows - last, self.rows)


def share_of(rows: int, rank: int, size: int) -> Share:
    """The part of rank `rank` of `size`; no two differ by more than one row. 5 rows, two ranks -> 0..2 and 2..5."""
    return Share(rows, rows * rank // size, rows * (rank + 1) // size)


def step_rows(step: int, batch: int, own: int, every: int) -> tuple[int, int]:
    """Which of its `own` sequences a rank has in step `step`, of `every` that are trained on, `batch` of them in a step.

    Ranks go through theirs at one pace: 15 of 30, four in a step -> two in each of seven steps, one in the last.
    """
    return min(step * batch * own // every, own), min((step + 1) * batch * own // every, own)


class Owners:
    """Gives work to ranks one after another, each to the one that has least so far; the same on every rank."""

    def __init__(self, size: int):
        self.loads = [0.0] * size

    def give(self, costs: dict[str, float]) -> dict[str, int]:
        """Owner of each piece of work by name, the costliest first: {"a": 3, "b": 2, "c": 2}, two ranks -> a 0, b 1, c 1."""
        found = {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            found[name] = min(range(len(self.loads)), key=self.loads.__getitem__)
            self.loads[found[name]] += costs[name]
        return {name: found[name] for name in costs}


def padded(size: int) -> int:
    """Bytes that a tensor takes among others that are gathered with it: a view in another dtype begins at a multiple of its size.

    100 -> 112.
    """
    return -(-size // 16) * 16
