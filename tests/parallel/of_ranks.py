"""What processes do that tests start: they join the others, and leave what they found in files."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.core.errors import UsageError
from lbllm_cli.parallel import watch
from lbllm_cli.parallel.group import ALONE, Group, agree, merged, stacked
from lbllm_cli.parallel.join import joined
from lbllm_cli.training.exchange import Exchange

ROOT = Path(__file__).parents[2]
# Bytes that operations hand over, by the name of the operation.
Bytes = dict[str, int]
# Different names, types and shapes on every rank; the third has nothing at all.
NAMED = (
    {"a": (torch.bfloat16, (3, 5)), "b": (torch.uint8, (7,)), "empty": (torch.float16, (0, 4))},
    {"c": (torch.int8, (2, 3, 2)), "a": (torch.float16, (1, 1)), "d": (torch.float32, ())},
    {},
    {"e": (torch.int64, (5,)), "f": (torch.bool, (9,)), "empty": (torch.uint8, (0,))},
)


def named(rank: int) -> dict[str, Tensor]:
    """The tensors of a rank."""
    generator = torch.Generator().manual_seed(rank)
    return {
        name: torch.randint(-100, 100, shape, generator=generator).to(dtype) for name, (dtype, shape) in NAMED[rank].items()
    }


def numbers(rank: int) -> list[float]:
    """What a rank has of two sums; the order in which the first is added up shows in it."""
    return [(1e16, 1.0, -1e16, 1.0)[rank], 0.1 * (rank + 1)]


def values(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of a rank, [3, 4]: whole numbers, whose sums have no rounding."""
    return (torch.arange(12).reshape(3, 4) + 100 * rank).to(dtype)


def use_group(group: Group) -> dict[str, Any]:
    """Every call of a group, and the bytes that each has handed over."""
    found: dict[str, Any] = {"rank": group.rank, "size": group.size, "first": group.first, "bytes": {}}
    asked: list[int] = []

    def ask() -> list[Any]:
        asked.append(1)
        return ["found by", group.rank]

    def note(name: str, call: Callable[[], Any]) -> None:
        before = group.traffic.copy()
        found[name] = call()
        found["bytes"][name] = {kind: count for kind, count in (group.traffic - before).bytes.items() if count}

    def changed(tensor: Tensor, call: Callable[[Tensor], None]) -> Tensor:
        call(tensor)
        return tensor

    def reduced() -> list[Tensor]:
        tensors = [values(group.rank) + 1000 * place for place in range(group.node.size)]
        pending = [group.node.begin_reduce(tensor, place) for place, tensor in enumerate(tensors)]
        for one in pending:
            one.wait()
        return tensors

    note("share", lambda: group.share(11))
    note("facts", lambda: group.facts({"rank": group.rank, "text": "x" * 100 * group.rank}))
    note("told", lambda: group.told(ask))
    found["asked"] = len(asked)
    note("total", lambda: group.total(numbers(group.rank)))
    note("some", lambda: group.some([group.rank == 1, False, True]))
    note("meet", group.meet)
    note("add", lambda: changed(values(group.rank), group.add))
    note("add float64", lambda: changed(values(group.rank, torch.float64), group.add))
    note("send", lambda: changed(values(group.rank), lambda tensor: group.send(tensor, 1)))
    note("spread", lambda: changed(values(group.rank), lambda tensor: group.begin_spread(tensor, 1).wait()))
    note("reduced", reduced)
    note("spread in node", lambda: changed(values(group.rank), lambda tensor: group.node.begin_spread(tensor, 1).wait()))
    note("gathered", lambda: group.gathered(named(group.rank)))
    note("gathered in node", lambda: group.node.gathered(named(group.rank)))
    note("gathered nothing", lambda: group.gathered({}))
    own, common = torch.tensor([group.rank + 1.0, 2.0]), torch.tensor([3.0])
    note("norm", lambda: group.norm(own, common))
    note("norm in node", lambda: group.node.norm(own, common))
    note("norm of nothing", lambda: group.norm(torch.zeros(0), common))
    note("merged", lambda: merged(group, {f"of {group.rank}": values(group.rank)}))
    note("stacked", lambda: stacked(group, {"x": values(group.rank)[: group.rank]}))
    note("agree", lambda: agree(group, {"same": 1, "rank": group.rank // 2, **({"last": 1} if group.rank == 1 else {})}))
    found["node"] = group.node.rank, group.node.size
    found["waited"] = group.traffic.waited
    return found


class Experts:
    """Something trained: a linear, and three more of which each row goes through one; a gain, and shifts in other types."""

    def __init__(self, group: Group):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            shapes = {"never": (4, 6), "in": (6, 5), "even": (4, 6), "odd": (4, 6)}
            self.weights = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
            self.gain, self.unused = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(2, 3))
            self.shift = nn.Parameter(torch.randn(4, dtype=torch.float64))
            self.tail = nn.Parameter(torch.randn(3, 1))
        self.owners = [place % group.node.size for place in range(len(self.weights))]

    def spread_weights(self) -> list[tuple[nn.Parameter, int]]:
        """See `Trained`."""
        return list(zip(self.weights.values(), self.owners, strict=True))

    def copies(self) -> list[nn.Parameter]:
        """See `Trained`."""
        return [self.gain, self.unused, self.shift, self.tail]

    def loss(self, rows: list[int]) -> Tensor:
        """Of some rows, in which every expert has its own; means over them."""
        inputs = torch.randn(16, 5, generator=torch.Generator().manual_seed(6))
        errors = []
        for row in rows:
            inner = torch.tanh(self.weights["in"] @ inputs[row]) * self.gain
            outer = self.weights["odd" if row % 2 else "even"] @ inner
            # Only some rows read it.
            outer = outer + self.shift.float() if row > 3 else outer
            errors.append((outer - row * self.tail.sum() / 10).square().sum())
        return torch.stack(errors).mean()

    def gradients(self) -> dict[str, Tensor | None]:
        """Of everything."""
        copies = {"gain": self.gain, "unused": self.unused, "shift": self.shift, "tail": self.tail}
        return {name: None if p.grad is None else p.grad.clone() for name, p in (self.weights | copies).items()}


# Rows of the micro-batches of each rank in a step, of two ranks and of four.
STEPS: dict[str, list[list[list[int]]]] = {
    "all have all": [[[0, 1, 2]], [[4, 5]], [[6, 9]], [[3, 8]]],
    "micro-batches": [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 11]], [[10, 9]], [[12, 13], [15, 14]]],
    "an expert on one rank": [[[0, 2], [4]], [[1, 3, 5]], [[6]], [[8], [10]]],
    "an expert in the first micro-batch only": [[[0, 1], [2]], [[5, 4], [3]], [[6, 7], [9]], [[8]]],
    "an expert nowhere": [[[0, 2]], [[4]], [[6]], [[8]]],
    "a rank without rows": [[[0, 1, 2]], [], [[3]], []],
    "first rank without rows": [[], [[1, 4]], [], [[6, 9]]],
    "only rows that read no shift": [[[0]], [[1]], [[2]], [[3]]],
}


def step(student: Experts, exchange: Exchange, micro: list[list[int]], whole: int) -> dict[str, Tensor | None]:
    """A step as the training loop does it; gradients that are left."""
    for number, rows in enumerate(micro):
        part = student.loss(rows) * (len(rows) / whole)
        if number == len(micro) - 1:
            exchange.last()
        part.backward()
    exchange.weights_done()
    exchange.copies_done()
    found = student.gradients()
    for parameter in (*student.weights.values(), *student.copies()):
        parameter.grad = None
    return found


def exchange_gradients(group: Group) -> dict[str, Any]:
    """All steps, one after another, with one exchange."""
    student = Experts(group)
    exchange = Exchange(student, group)
    found: dict[str, Any] = {}
    for name, ranks in STEPS.items():
        ranks = ranks[: group.size]
        whole = sum(len(rows) for micro in ranks for rows in micro)
        found[name] = step(student, exchange, ranks[group.rank], whole)
    return found


def alone(name: str, size: int) -> dict[str, Tensor | None]:
    """Gradients of one process that has the rows of `size` ranks in one micro-batch."""
    student = Experts(ALONE)
    rows = [row for micro in STEPS[name][:size] for part in micro for row in part]
    return step(student, Exchange(student, ALONE), [rows], len(rows))


def leave(folder: Path) -> None:
    """Calls of a group and gradients, left in a file of each rank."""
    with joined() as group:
        torch.save({"group": use_group(group), "exchange": exchange_gradients(group)}, folder / f"{group.rank}.pt")


def left_by(folder: Path, size: int) -> list[dict[str, Any]]:
    """What ranks have left."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def wait(group: Group, folder: Path, rank: int) -> None:
    """One rank stands apart, all others wait for it in an operation."""
    if group.rank == rank:
        (folder / "apart").touch()
        time.sleep(600)
    group.meet()


def refuse(group: Group, folder: Path, rank: int) -> None:
    """One rank finds a mistake that no other sees."""
    if group.rank == rank:
        raise UsageError("rates.txt holds no rates")
    group.meet()


def fail(group: Group, folder: Path, rank: int) -> None:
    """One rank has a bug."""
    if group.rank == rank:
        raise ZeroDivisionError("of a bug")
    group.meet()


def nothing(group: Group, folder: Path, rank: int) -> None:
    """All is well."""


def other_library(group: Group, folder: Path, rank: int) -> None:
    """One rank has another numpy; see `watched`."""


@dataclass(frozen=True)
class Times:
    """What a watch goes by, in seconds. A busy machine may keep a rank from its beats for a while."""

    beat: float = 0.2
    lost: float = 45.0
    late: float = 300.0
    grace: float = 1.0


def watched(work: Callable[[Group, Path, int], None], folder: Path, rank: int, times: Times) -> None:
    """Does one of these as a command of lbllm does its work."""
    from lbllm_cli.cli.ending import run_ranks

    watch.BEAT, watch.LOST, watch.LATE, watch.GRACE = times.beat, times.lost, times.late, times.grace
    if work is other_library and os.environ["RANK"] == str(rank):
        real = metadata.version
        metadata.version = lambda name: "0.0.1" if name == "numpy" else real(name)
    run_ranks(lambda recipe, group: work(group, folder, rank), ROOT / "recipes" / "toy.yaml", None)
