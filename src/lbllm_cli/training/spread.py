"""Linears whose masters are spread over a machine's ranks: who owns which."""

from collections.abc import Iterable

from torch import nn

from lbllm_cli.parallel.group import Group
from lbllm_cli.parallel.shares import Owners
from lbllm_cli.training.master import BITMAP, WEIGHTS


class Spread:
    """Who owns the masters of which linears, with their gradients and moments: whole linears, each at one rank of a machine.

    Only where masters are as large as weights. Levels of fixed codes are a few percent of them: every rank has a copy, and what
    is sent is their gradient instead of the weight's.
    """

    def __init__(self, group: Group, trained: Iterable[str]):
        self.group, self.node = group, group.node
        self.large = bool({WEIGHTS, BITMAP} & set(trained))
        self._owners = Owners(self.node.size)
        self.owner: dict[str, int] = {}

    def add(self, prefix: str, linears: dict[str, nn.Linear]) -> list[str]:
        """Gives a block's linears to owners. prefix: of the block's names. Returns those that this rank has masters of."""
        if not self.large:
            return list(linears)
        given = self._owners.give({prefix + name: float(linear.weight.numel()) for name, linear in linears.items()})
        self.owner |= given
        return [name for name in linears if given[prefix + name] == self.node.rank]
