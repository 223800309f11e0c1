"""Linears whose masters are spread over a machine's ranks: who owns which."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lbllm_cli.parallel.group import Group, Pending
from lbllm_cli.parallel.shares import Owners
from lbllm_cli.training.master import BITMAP, WEIGHTS


def is_large(trained: Iterable[str]) -> bool:
    """Whether masters are as large as weights, which is when they are spread. trained: kinds of parameters."""
    return bool({WEIGHTS, BITMAP} & set(trained))


def owners_of(shapes: Mapping[str, tuple[int, int]], node: int, blocks: int = 1) -> list[dict[str, int]]:
    """Owners of a block's linears among `node` ranks of a machine, of some blocks that are trained together, as `Spread` gives
    them. shapes: (out, in) by name, in the order of a block's linears.
    """
    owners = Owners(node)
    return [owners.give({name: float(rows * width) for name, (rows, width) in shapes.items()}) for _ in range(blocks)]


def loads_of(shapes: Mapping[str, tuple[int, int]], node: int, blocks: int = 1) -> list[int]:
    """Weights that each rank of a machine has masters of; see `owners_of`."""
    loads = [0] * node
    for owners in owners_of(shapes, node, blocks):
        for name, rank in owners.items():
            loads[rank] += shapes[name][0] * shapes[name][1]
    return loads


class Spread:
    """Who owns the masters of which linears, with their gradients and moments: whole linears, each at one rank of a machine.

    Only where masters are as large as weights. Levels of fixed codes are a few percent of them: every rank has a copy, and what
    is sent is their gradient instead of the weight's.
    """

    def __init__(self, group: Group, trained: Iterable[str]):
        self.group, self.node = group, group.node
        self.large = is_large(trained)
        self._owners = Owners(self.node.size)
        self.owner: dict[str, int] = {}
        self._coming: dict[str, Pending] = {}

    def add(self, prefix: str, linears: dict[str, nn.Linear]) -> list[str]:
        """Gives a block's linears to owners. prefix: of the block's names. Returns those that this rank has masters of."""
        if not self.large:
            return list(linears)
        given = self._owners.give({prefix + name: float(linear.weight.numel()) for name, linear in linears.items()})
        self.owner |= given
        return [name for name in linears if given[prefix + name] == self.node.rank]

    def expect(self, name: str, linear: nn.Linear) -> None:
        """From now on a linear waits for its weight before it runs, and not before. name: its full one."""
        if self.large and self.node.size > 1:
            linear.register_forward_pre_hook(lambda *_: self._arrived(name))

    def _arrived(self, name: str) -> None:
        if (pending := self._coming.pop(name, None)) is not None:
            pending.wait()

    def send(self, name: str, weight: Tensor) -> None:
        """Gives all ranks of the machine the weight that the owner of its masters has put. name: the linear's full one."""
        self._coming[name] = self.node.begin_spread(weight.detach(), self.owner[name])

    def all_arrived(self) -> None:
        """Waits for weights that nobody has run with, as those of experts that no token was sent to."""
        for name in list(self._coming):
            self._arrived(name)
