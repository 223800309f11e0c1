"""How many ranks a forecast is for."""

from dataclasses import dataclass

from lbllm_cli.core.errors import UsageError
from lbllm_cli.parallel.group import Group

# Ranks of a machine where nobody has said how many.
_USUAL_NODE = 8


@dataclass(frozen=True)
class World:
    """Ranks that do a stage together. size: all of them. node: those of one machine, of which all have as many."""

    size: int = 1
    node: int = 1

    @classmethod
    def of(cls, group: Group) -> "World":
        """The ranks that are running."""
        return cls(group.size, group.node.size)

    @classmethod
    def asked(cls, size: int, node: int | None) -> "World":
        """What a command line names. node: None for all, but 8 at most. Raises UsageError for machines with unequally many ranks.

        16, None -> two machines of 8; 12, None is refused.
        """
        each = min(size, _USUAL_NODE) if node is None else node
        if size % each:
            raise UsageError(
                f"--world-size {size} is no multiple of --per-node {each}: every machine has as many ranks; "
                f"give --per-node a divisor of {size}"
            )
        return cls(size, each)

    @property
    def several(self) -> bool:
        """Whether it is more than one process."""
        return self.size > 1

    @property
    def machines(self) -> int:
        """On so many machines."""
        return self.size // self.node

    def most(self, rows: int) -> int:
        """Rows of the rank that has most of them: 5 rows, two ranks -> 3."""
        return -(-rows // self.size)

    def __str__(self) -> str:
        machines = f"{self.machines} machines" if self.machines > 1 else "one machine"
        return f"{self.size} ranks on {machines}"
