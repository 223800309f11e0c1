"""How long a stage takes on a card: its operations and bytes, counted from shapes, at the rates that a card reaches.

Arithmetic, not a measurement: a part takes as long as its matrix products and its passes over memory together, or as its copies
of hidden states, which run beside them. `scripts/bench/device_counts.py` counts the same on a simulated device.
"""

from dataclasses import dataclass
from math import ceil, inf

from lbllm_cli.models.block import block_prefix
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.forecast import Place
from lbllm_cli.runtime.cards import Card
from lbllm_cli.runtime.experts import expert_of

# Bytes a second of hidden states, read and written beside each other: within a card's memory nothing is copied, RAM is behind a
# copy into pinned memory, disk is NVMe.
_READ: dict[Place, float] = {"device": inf, "ram": 7e9, "disk": 5e9}
_WRITTEN: dict[Place, float] = {"device": inf, "ram": 7e9, "disk": 3e9}
# What training moves besides products, in passes over hidden states of the compute dtype: norms, activations, residuals and
# attention, forward and back. Of a forward pass alone a third.
_PASSES = 120.0


@dataclass(frozen=True)
class Part:
    """One kind of work. products: FLOP in 16 bits. exact: FLOP in float32. passed: bytes read and written on the device.

    read, written: bytes of hidden states that come from elsewhere, and go there. key: of the recipe; half of it halves the part.
    """

    name: str
    key: str
    products: float = 0.0
    exact: float = 0.0
    passed: float = 0.0
    read: float = 0.0
    written: float = 0.0
    launches: float = 0.0

    def seconds(self, card: Card, place: Place) -> float:
        """On a card, with streams in a place."""
        return max(self._limits(card, place).values())

    def limit(self, card: Card, place: Place) -> str:
        """What holds it up, in words."""
        limits = self._limits(card, place)
        return max(limits, key=lambda name: limits[name])

    def _limits(self, card: Card, place: Place) -> dict[str, float]:
        products = self.products / (card.reached * card.bf16) + self.exact / (card.reached * card.fp32)
        passed = self.passed / (card.passed * card.bandwidth)
        return {
            "matrix products" if products > passed else "memory bandwidth": products + passed,
            "launches": self.launches * card.launch,
            "copies of hidden states": max(self.read / _READ[place], self.written / _WRITTEN[place]),
        }


@dataclass(frozen=True)
class BlockShape:
    """What a block's work follows from. weights: of its linears. used: those that a token's pass multiplies. inputs: of its
    units, width of the input, rows that it feeds, and share of the tokens that come: of experts, those that are sent to one.

    attention: FLOP of a token's scores and sums at the mean distance of a sequence. hidden: width of a hidden state.
    """

    weights: float
    used: float
    inputs: tuple[tuple[int, int, float], ...]
    attention: float
    hidden: int
    itemsize: int

    @classmethod
    def of(cls, model: SourceModel, length: int) -> "BlockShape":
        """Of a model's blocks, at sequences of `length` tokens."""
        shapes = [[model.shapes[f"{block_prefix(0)}{name}.weight"] for name in unit] for unit in model.units]
        sent = model.experts[1] / model.experts[0] if model.experts else 1.0
        shares = [1.0 if expert_of(unit[0]) is None else sent for unit in model.units]
        inputs = tuple((unit[0][1], sum(shape[0] for shape in unit), share) for unit, share in zip(shapes, shares, strict=True))
        heads = model.shapes[f"{block_prefix(0)}self_attn.o_proj.weight"][1]
        weights = float(sum(width * rows for width, rows, _ in inputs))
        used = sum(width * rows * share for width, rows, share in inputs)
        return cls(weights, used, inputs, 2.0 * length * heads, int(model.config.hidden_size), model.dtype.itemsize)

    def forward(self, tokens: float) -> float:
        """FLOP of a pass."""
        return tokens * (2 * self.used + self.attention)

    def states(self, tokens: float) -> float:
        """Bytes of a stream."""
        return tokens * self.hidden * self.itemsize

    def passes(self, tokens: float, share: float = 1.0) -> float:
        """Bytes that a pass with its gradients moves besides weights. share: of it, a third without gradients."""
        return share * _PASSES * self.states(tokens)


def steps(rows: int, held_out: int, batch: int, epochs: int) -> int:
    """Optimizer steps: 100 rows, 6 of them held out, 2 in a step, 2 epochs -> 94."""
    return epochs * ceil((rows - held_out) / batch)
