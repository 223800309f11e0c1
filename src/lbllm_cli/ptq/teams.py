"""Which rank fits what: whole units where a pass has enough of them, else rows of each; and moments on their way there."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.parallel.group import ALONE, Group
from lbllm_cli.parallel.shares import Owners
from lbllm_cli.ptq.moments import InputMoments
from lbllm_cli.runtime.units import Unit

# Fewer rows of a linear are not divided: vectors of eight are what processors compute with at least.
_ROWS = 8


@dataclass(frozen=True)
class Team:
    """Who fits a unit. owner: the rank that fits all of it, None where each of `ranks` fits rows of every linear."""

    ranks: Group
    owner: int | None = None

    @property
    def fits(self) -> bool:
        """Whether this rank takes part."""
        return self.owner in (None, self.ranks.rank)

    @property
    def together(self) -> Group:
        """Whose sums over rows are those of a whole linear."""
        return self.ranks if self.owner is None else ALONE

    def rows(self, count: int) -> slice:
        """Rows of a linear that this rank fits, of a unit that it takes part in."""
        return self.together.share(count).slice

    def pool(self, moments: InputMoments) -> None:
        """Sums moments over all ranks, where they are needed; see `counted` for how many tokens they are of."""
        for matrix in (moments.hessian, moments.drift):
            if matrix is None:
                continue
            if self.owner is None:
                self.ranks.add(matrix)
            else:
                self.ranks.send(matrix, self.owner)


def owners_of(shapes: dict[Unit, list[tuple[int, int]]], size: int) -> dict[Unit, int] | None:
    """Which of `size` ranks fits each unit of a pass; None where each fits rows of every linear. shapes: of each unit's linears,
    (out, in).

    Whole units cost one factorisation each; rows of one cost every rank a factorisation, and leave nobody idle where a pass has
    fewer units than there are ranks, as every pass of a dense model in sequential order.
    """
    fewest = min(out for linears in shapes.values() for out, _ in linears)
    if size == 1 or (len(shapes) < size and fewest >= _ROWS * size):
        return None
    # A factorisation, its inverse, and what is done with every row.
    costs = {unit[0]: sum(8.0 * out * inn**2 for out, inn in linears) + linears[0][1] ** 3 for unit, linears in shapes.items()}
    owners = Owners(size).give(costs)
    return {unit: owners[unit[0]] for unit in shapes}


def teams_of(shapes: dict[Unit, list[tuple[int, int]]], group: Group) -> dict[Unit, Team]:
    """Who fits the units of a pass; see `owners_of`."""
    owners = owners_of(shapes, group.size)
    return {unit: Team(group, None if owners is None else owners[unit]) for unit in shapes}


def counted(group: Group, parts: list[InputMoments]) -> None:
    """Adds up how many tokens moments are of."""
    for part, tokens in zip(parts, group.total([part.tokens for part in parts]), strict=True):
        part.tokens = round(tokens)


def gathered_weights(group: Group, parts: dict[str, PackedWeight], widths: dict[str, int]) -> dict[str, PackedWeight]:
    """Whole linears out of the rows that the ranks have fitted. parts: of this one. widths: of all linears, by name."""
    rows: dict[str, list[Tensor]] = {}
    for found in group.gathered({key: tensor for name, part in parts.items() for key, tensor in part.to_tensors(name).items()}):
        for key, tensor in found.items():
            rows.setdefault(key, []).append(tensor)
    whole = {key: parts[0] if len(parts) == 1 else torch.cat(parts) for key, parts in rows.items()}
    return {name: PackedWeight.from_tensors(whole, name, width) for name, width in widths.items()}
