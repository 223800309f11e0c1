"""A reduction while the caller goes on: within a machine to one of its ranks, and then over the machines."""

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from lbllm_cli.parallel.ranks import Ranks

BETWEEN = "all-reduce between nodes"


class Reductions:
    """Those of one rank, in the order in which all ranks begin them.

    ranks: of a machine; where each has others of its number on other machines (`across`), an owner then adds up what they have.
    That begins once the machine's own sum is there, not when somebody waits for it: a network is slower than what is inside.
    """

    def __init__(self, ranks: "Ranks"):
        self.ranks = ranks
        self._within: deque[Reduction] = deque()
        self._streams: dict[torch.device, Any] = {}

    def begin(self, tensor: Tensor, rank: int) -> "Reduction":
        """Sums a tensor at a rank of the machine, and over machines; in place."""
        found = Reduction(self, tensor, rank)
        if self.ranks.across is None or tensor.is_cpu:
            found.within()
            self._within.append(found)
            # A thread of the library's does it: one that is over by now goes on, others when the next begins or somebody waits.
            while self._within and self._within[0].work.is_completed():
                self._within.popleft().between()
        else:
            self._behind(tensor.device, found)
        return found

    def all_between(self) -> None:
        """All of them are on their way between machines now; what is within one is waited for."""
        while self._within:
            self._within.popleft().between()

    def _behind(self, device: torch.device, found: "Reduction") -> None:
        """On a device: one after the other on a stream that nothing is computed on, which waits for what the gradient needs."""
        current = torch.accelerator.current_stream(device)
        if device not in self._streams:
            self._streams[device] = torch.Stream(device=device)
        aside = self._streams[device]
        aside.wait_stream(current)
        torch.accelerator.set_stream(aside)
        try:
            found.within()
            found.between()
        finally:
            torch.accelerator.set_stream(current)


class Reduction:
    """One of them."""

    def __init__(self, reductions: Reductions, tensor: Tensor, rank: int):
        self.reductions, self.tensor, self.rank = reductions, tensor, rank
        self.work: Any = None

    def within(self) -> None:
        """Begins the sum of a machine's ranks."""
        ranks = self.reductions.ranks
        with ranks.call("reduce", self.tensor.nbytes):
            self.work = dist.reduce(self.tensor, group=ranks.handle, group_dst=self.rank, async_op=True)

    def between(self) -> None:
        """Begins the sum over machines, behind the machine's own."""
        ranks = self.reductions.ranks
        with ranks.call("reduce", 0):
            self.work.wait()
        if ranks.across is not None and ranks.rank == self.rank:
            with ranks.call(BETWEEN, self.tensor.nbytes):
                self.work = dist.all_reduce(self.tensor, group=ranks.across, async_op=True)

    def wait(self) -> None:
        """See `Pending`."""
        self.reductions.all_between()
        with self.reductions.ranks.call("reduce", 0):
            self.work.wait()
