"""How many inputs share four levels: of most linears one size, of some a larger one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from lbllm_cli.format.names import input_name

SIZE_MIN, SIZE_MAX = 16, 4096
Units = tuple[tuple[str, ...], ...]


def is_group_size(value: Any) -> bool:
    """Whether a value of a file is one: 64 is, 24 and True are not."""
    return type(value) is int and SIZE_MIN <= value <= SIZE_MAX and value % SIZE_MIN == 0


def whole_groups(step: int, size: int, width: int) -> bool:
    """Whether inputs that share a step are whole groups of weights, as kernels of a GPU take them: 64, 16, 576 are, 32, 48, 576
    are not. step: of them. size: of a group. width: of a row, which may share one step.
    """
    return step % size == 0 or step >= width


def linear_name(block: int, linear: str) -> str:
    """A linear of all blocks, as recipes and files call it: 3, "mlp.down_proj" -> "layers.3.mlp.down_proj"."""
    return f"layers.{block}.{linear}"


@dataclass(frozen=True)
class GroupSizes:
    """Inputs that share four levels. size: of every linear but the others. others: by `linear_name`."""

    size: int
    others: Mapping[str, int] = field(default_factory=dict)

    def of(self, block: int, linear: str) -> int:
        """Of a block's linear, by its name in the block."""
        return self.others.get(linear_name(block, linear), self.size)

    def of_unit(self, block: int, unit: tuple[str, ...]) -> int:
        """Of linears that read one input, which have the same. Raises ValueError naming two that have not."""
        found = {self.of(block, linear): linear for linear in unit}
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise ValueError(
                f"{linear_name(block, first)} has groups of {one}, {linear_name(block, second)} of {other}; they read one input, "
                "give them the same"
            )
        return next(iter(found))

    def __str__(self) -> str:
        """For people: "16, of some linears 32 and 64"."""
        larger = sorted(set(self.others.values()))
        return f"{self.size}, of some linears {' and '.join(map(str, larger))}" if larger else str(self.size)

    def as_dict(self) -> dict[str, dict[str, int]]:
        """What files say beside `group_size`: nothing where all have that one."""
        return {"group_sizes": dict(self.others)} if self.others else {}

    @classmethod
    def matching(cls, size: int, wanted: Mapping[str, int], blocks: int, units: Units) -> "GroupSizes":
        """As a recipe asks for them. wanted: size by a pattern of names; of several that match, the smallest size counts.

        size 16, {"layers.[01].self_attn.*": 32} of a Llama with 30 blocks -> 8 others of 32. Raises ValueError naming a pattern
        that no linear matches or that others outdo everywhere, or linears that read one input with two sizes.
        """
        if not wanted:
            return cls(size)
        names = [linear_name(block, linear) for block in range(blocks) for unit in units for linear in unit]
        others: dict[str, int] = {}
        for pattern, other in wanted.items():
            matched = [name for name in names if fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(f"{pattern} matches no linear; they are called {names[0]} to {names[-1]}")
            others |= {name: min(other, others.get(name, other)) for name in matched}
        for pattern, other in wanted.items():
            if all(others[name] < other for name in names if fnmatchcase(name, pattern)):
                raise ValueError(f"{pattern}: {other} changes nothing: of patterns that match a linear the smallest size counts")
        found = cls(size, {name: others[name] for name in names if others.get(name, size) != size})
        # All experts of a block read their input through one quantizer, and kernels take them together.
        alike: dict[str, tuple[str, ...]] = {}
        for unit in units:
            alike[input_name(unit)] = alike.get(input_name(unit), ()) + unit
        for block in range(blocks):
            for unit in alike.values():
                found.of_unit(block, unit)
        return found
