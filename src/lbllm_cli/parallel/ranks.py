"""Several processes, over `torch.distributed`: gloo between CPUs, NCCL between GPUs, and gloo for what is said in Python."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lbllm_cli.core.errors import Interrupted, RunError
from lbllm_cli.parallel.group import Pending, Traffic
from lbllm_cli.parallel.reduction import Reductions
from lbllm_cli.parallel.shares import Share, padded, share_of
from lbllm_cli.parallel.watch import Watch

T = TypeVar("T")
# What a rank that lost another waits for its last words.
_LAST_WORDS = 5.0


class Ranks:
    """A `Group` of several processes.

    handle: torch's. rank: in it. across: of a node's group, the ranks of other nodes with the same number there.
    """

    def __init__(self, handle: Any, watch: Watch, traffic: Traffic, across: Any = None):
        self.handle, self.watch, self.traffic, self.across = handle, watch, traffic, across
        self.rank, self.size = dist.get_rank(handle), dist.get_world_size(handle)
        self._node: Ranks | None = None
        self._reductions = Reductions(self)

    @property
    def first(self) -> bool:
        """Rank 0."""
        return self.rank == 0

    @property
    def node(self) -> "Ranks":
        """All, where there is one machine."""
        return self if self._node is None else self._node

    def with_nodes(self, size: int, timeout: timedelta) -> "Ranks":
        """Makes the groups of machines that have `size` ranks each, in order. timeout: of their operations."""
        nodes = [dist.new_group(range(first, first + size), timeout) for first in range(0, self.size, size)]
        across = [dist.new_group(range(place, self.size, size), timeout) for place in range(size)]
        self._node = Ranks(nodes[self.rank // size], self.watch, self.traffic, across[self.rank % size])
        return self

    def share(self, rows: int) -> Share:
        """See `Group`."""
        return share_of(rows, self.rank, self.size)

    def facts(self, value: T) -> list[T]:
        """See `Group`."""
        found: list[Any] = [None] * self.size
        with self.call("facts", 0):
            dist.all_gather_object(found, value, group=self.handle)
        return found

    def told(self, ask: Callable[[], T]) -> T:
        """See `Group`."""
        found: list[Any] = [ask() if self.first else None]
        with self.call("facts", 0):
            dist.broadcast_object_list(found, group=self.handle, group_src=0)
        answer: T = found[0]
        return answer

    def total(self, numbers: Sequence[float]) -> list[float]:
        """See `Group`: added up here, so that no algorithm of a library decides on their order."""
        return [sum(column) for column in zip(*self.facts(list(numbers)), strict=True)]

    def some(self, flags: Sequence[bool]) -> list[bool]:
        """See `Group`."""
        found = torch.tensor(list(flags), dtype=torch.uint8)
        with self.call("facts", 0):
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.handle)
        return [bool(flag) for flag in found]

    def meet(self) -> None:
        """See `Group`."""
        self.some([False])

    def add(self, tensor: Tensor) -> None:
        """See `Group`."""
        with self.call("all-reduce", tensor.nbytes):
            dist.all_reduce(tensor, group=self.handle)

    def send(self, tensor: Tensor, rank: int) -> None:
        """See `Group`."""
        with self.call("reduce", tensor.nbytes):
            dist.reduce(tensor, group=self.handle, group_dst=rank)

    def begin_reduce(self, tensor: Tensor, rank: int) -> Pending:
        """See `Group`."""
        return self._reductions.begin(tensor, rank)

    def begin_spread(self, tensor: Tensor, rank: int) -> Pending:
        """See `Group`."""
        with self.call("broadcast", tensor.nbytes):
            return _Spread(self, dist.broadcast(tensor, group=self.handle, group_src=rank, async_op=True))

    def gathered(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """See `Group`: as bytes, in one operation."""
        kinds = {tensor.device.type for tensor in tensors.values()}
        said = self.facts((kinds, [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]))
        described = [one for _, one in said]
        sizes = [sum(padded(dtype.itemsize * torch.Size(shape).numel()) for _, dtype, shape in one) for one in described]
        # A rank without tensors takes part where the others have theirs.
        device = torch.device(next(kind for kinds, _ in said for kind in kinds)) if any(described) else torch.device("cpu")
        mine = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
        place = 0
        for tensor in tensors.values():
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            mine[place : place + len(flat)] = flat
            place += padded(len(flat))
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with self.call("gather", len(mine)):
            dist.all_gather(every, mine, group=self.handle)
        return [_unpacked(row, one) for row, one in zip(every, described, strict=True)]

    def norm(self, own: Tensor, common: Tensor) -> Tensor:
        """See `Group`."""
        square = own.square().sum()
        self.add(square)
        return (square + common.square().sum()).sqrt()

    @contextmanager
    def call(self, kind: str, size: int) -> Iterator[None]:
        """Counts what an operation hands over and how long it is waited for; names what a lost rank makes of it."""
        began = time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError:
            raise  # it is a RuntimeError, and this rank's own
        except RuntimeError as error:
            self.lost(error)
        finally:
            self.traffic.waited += time.monotonic() - began
        if size:
            self.traffic.bytes[kind] = self.traffic.bytes.get(kind, 0) + size

    def lost(self, error: RuntimeError) -> NoReturn:
        """Raises what an operation without its other ranks means: they were stopped, or one of them failed."""
        code = self.watch.ended(_LAST_WORDS)
        if code == Interrupted.exit_code:
            raise Interrupted("another rank was stopped; run the same command again to resume") from None
        # Between the place in torch's own source and its guesses.
        said = re.sub(r"^\[[^]]*\]\s*|\. This is typically .*$", "", " ".join(str(error).split()))
        raise RunError(f"the ranks have lost each other ({said[:200]}); run the same command again to resume") from None


class _Spread:
    """A broadcast under way."""

    def __init__(self, ranks: Ranks, work: Any):
        self.ranks, self.work = ranks, work

    def wait(self) -> None:
        """See `Pending`."""
        with self.ranks.call("broadcast", 0):
            self.work.wait()


def _unpacked(row: Tensor, described: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    found, place = {}, 0
    for name, dtype, shape in described:
        size = dtype.itemsize * torch.Size(shape).numel()
        found[name] = row[place : place + size].view(dtype).view(shape).clone()
        place += padded(size)
    return found
