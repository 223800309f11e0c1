"""What the ranks of a stage hand over, worked out of shapes, and how long that takes on the links between them.

Bytes are those that `parallel.group.Traffic` counts while a stage runs. Time is arithmetic: operations go round a ring, in which
every link passes a tensor once where it is reduced or broadcast, and nearly twice where it is summed everywhere.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lbllm_cli.core.splits import spread_rows
from lbllm_cli.format.levels import per_row
from lbllm_cli.format.weights import group_count
from lbllm_cli.parallel.reduction import BETWEEN
from lbllm_cli.parallel.shares import padded, share_of
from lbllm_cli.pipeline.duration import Part
from lbllm_cli.pipeline.forecast import Place
from lbllm_cli.pipeline.world import World
from lbllm_cli.recipe.schema import Ptq
from lbllm_cli.runtime.cards import Card
from lbllm_cli.runtime.links import Link

ALL_REDUCE, REDUCE, BROADCAST, GATHER, OWNERS = "all-reduce", "reduce", "broadcast", "gather", BETWEEN
# What ranks say to each other in Python, which is counted as no bytes.
AGREEMENT = "agreement of ranks"
# A message of what ranks say to each other in Python, over TCP between CPUs; an assumption. It passes a ring twice.
_MESSAGE = 25e-6
# Of a micro-batch that is computed: on its way there weights arrive that it begins without, on the way back gradients go off.
FORWARD, BACKWARD = 1 / 3, 2 / 3


@dataclass(frozen=True)
class Call:
    """An operation between ranks that a stage repeats.

    what: in words. kind: as it is counted. size: bytes that a rank hands over, of the rank that has most. times: in a block, or
    in an end-to-end phase. step: it is part of every optimizer step. node: of the ranks of a machine, otherwise of all. beside:
    the share of a micro-batch that a rank computes meanwhile. operations: that it takes. together: bytes that a machine's ranks
    hand over where each has others.
    """

    what: str
    kind: str
    size: int
    times: int
    step: bool = False
    node: bool = False
    beside: float = 0.0
    operations: int = 1
    together: int = 0

    def inside(self, world: World, link: Link) -> float:
        """Seconds that one takes on a link between the GPUs of a machine."""
        if self.kind == OWNERS or world.node == 1 or not self.size:
            return 0.0
        return link.seconds(self.size * _passes(self.kind, world.node), self.operations)

    def between(self, world: World, link: Link) -> float:
        """Seconds that one takes on a link between machines."""
        if self.node or world.machines == 1 or not self.size:
            return 0.0
        if self.kind == GATHER:
            return link.seconds(self.size * (world.size - world.node) / link.cards, self.operations)
        # What ranks have apart from each other goes by a card of each.
        size = max(self.size, self.together / link.cards) if self.together else self.size / link.cards
        return link.seconds(size * _passes(self.kind, world.machines), self.operations)


def _passes(kind: str, count: int) -> float:
    """How often an operation of `count` takes a rank's tensor over each link of a ring."""
    if kind in (ALL_REDUCE, OWNERS):
        return 2 * (count - 1) / count
    return count - 1 if kind == GATHER else 1


@dataclass(frozen=True)
class Exchanged:
    """What a stage's ranks hand over. calls: of a block, or of an end-to-end phase. blocks: how often, 1 for a phase.

    steps: optimizer steps in each. micro: micro-batches of a rank's step, of which the first begins while weights come and the
    last is on its way back while gradients go off. said: times that ranks wait for what all of them say, in each.
    """

    calls: tuple[Call, ...]
    blocks: int
    steps: int = 0
    micro: int = 1
    said: int = 0

    def per_step(self) -> dict[str, int]:
        """Bytes by kind of an optimizer step, of the rank that hands over most."""
        return _summed((call.kind, call.size) for call in self.calls if call.step)

    def per_block(self) -> dict[str, int]:
        """Bytes by kind of a block, or of an end-to-end phase, steps included."""
        return _summed((call.kind, call.size * call.times) for call in self.calls)

    def inside(self, world: World, link: Link) -> float:
        """Seconds of the stage in which a link within a machine is busy."""
        return self.blocks * sum(call.times * call.inside(world, link) for call in self.calls)

    def between(self, world: World, link: Link) -> float:
        """Seconds of the stage in which a link between machines is busy."""
        return self.blocks * sum(call.times * call.between(world, link) for call in self.calls)

    def waits(self, world: World, links: tuple[Link, Link], training: float) -> dict[str, float]:
        """Seconds of the stage that nothing is computed in, by what ranks wait for.

        links: within a machine and between machines. training: seconds that the stage's steps are computed in.
        """
        micro = training / max(1, self.blocks * self.steps * self.micro)
        found: dict[str, float] = dict.fromkeys((call.kind for call in self.calls), 0.0)
        for call in self.calls:
            each = max(call.inside(world, links[0]), call.between(world, links[1]))
            found[call.kind] += self.blocks * call.times * max(0.0, each - call.beside * micro)
        said = self.blocks * self.said * 2 * (world.size - 1) * _MESSAGE
        # In a training the host says it while the device has work of a step before it.
        found[AGREEMENT] = max(0.0, said - training - sum(found.values())) if self.steps else said
        return {kind: seconds for kind, seconds in found.items() if seconds}


def _summed(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for kind, size in pairs:
        found[kind] += size
    return dict(found)


def stage_seconds(
    parts: Sequence[Part], exchanged: Exchanged, world: World, card: Card, place: Place, links: tuple[Link, Link]
) -> dict[str, float]:
    """How long a rank takes for a stage, by what it does: its parts, of which the first are a training's steps, and its waits.

    place: of its hidden states. links: within a machine and between machines.
    """
    computed = {part.name: part.seconds(card, place) for part in parts}
    training = computed[parts[0].name] if exchanged.steps else 0.0
    return computed | (exchanged.waits(world, links, training) if world.several else {})


def packed_sizes(shape: tuple[int, int], settings: Ptq) -> list[int]:
    """Bytes of the tensors of a packed linear: codes, levels, scales. (128, 352) in groups of 64 -> [12288, 3072, 1536]."""
    groups = shape[0] * group_count(shape[1], settings.group_size)
    scales = shape[0] if per_row(settings.level_bits) else groups
    return [groups * settings.group_size // 4, groups * settings.level_bits // 2, scales * 2]


def sample_call(what: str, world: World, rows: int, count: int, row_bytes: int) -> Call:
    """The gathering of `count` of a stage's `rows` sequences, spread over them, at `row_bytes` each; see `BlockTask.sample`."""
    taken = spread_rows(rows, min(count, rows))
    shares = (share_of(rows, rank, world.size) for rank in range(world.size))
    return Call(what, GATHER, padded(row_bytes * max(len(share.own(taken)) for share in shares)), 1)
