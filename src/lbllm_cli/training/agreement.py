"""How near a student's next-token predictions are to the teacher's on the same text."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lbllm_cli.parallel.group import Group

# Positions whose logits are compared at once: 256 x 128,256 (Llama 3) in float32 are 131 MB, four or five times.
POSITIONS = 256
# Beyond this a mean negative log likelihood has no finite perplexity in double precision.
_MOST_NATS = 700.0


class Predictions:
    """Next tokens that a model predicts, from its logits [n, vocab] of any float dtype.

    What comparing needs of them is worked out once: a vocabulary of 262,144 takes 268 MB for 256 positions, and a teacher is
    compared with several students. logs: float32 log probabilities [n, vocab].
    """

    def __init__(self, logits: Tensor):
        self.logs = log_softmax(logits.float(), dim=-1)

    @cached_property
    def probabilities(self) -> Tensor:
        """float32 [n, vocab]."""
        return self.logs.exp()

    @cached_property
    def likeliest(self) -> Tensor:
        """Tokens int64 [n]."""
        return self.logs.argmax(-1)

    def divergence(self, student: "Predictions") -> float:
        """Sum of KL(self || student) over the positions, in nats."""
        return float((self.logs - student.logs).mul_(self.probabilities).sum(-1).double().sum())


def perplexity(mean_nll: float) -> float:
    """exp of a mean negative log likelihood in nats; infinite beyond what a double holds."""
    return math.exp(mean_nll) if mean_nll < _MOST_NATS else math.inf


def octaves(count: int) -> list[tuple[int, int]]:
    """Positions 1 to `count` in ranges that double, first and last inclusive: 10 -> [(1, 1), (2, 3), (4, 7), (8, 10)]."""
    return [(1 << power, min(2 << power, count + 1) - 1) for power in range(count.bit_length())]


@dataclass
class Agreement:
    """Next-token predictions on one text, summed over its segments.

    length: tokens in a segment; position p predicts token p from the p before it, p = 1 to length - 1. nll: float64
    [length - 1], sum of -log p(true token) over the segments, in nats. divergence: sum of KL(teacher || student), in nats.
    same: positions where both find the same token likeliest. A teacher beside itself has divergence 0 and is always the same.
    """

    length: int
    nll: Tensor = field(init=False)
    divergence: float = 0.0
    same: int = 0
    positions: int = 0

    def __post_init__(self) -> None:
        self.nll = torch.zeros(self.length - 1, dtype=torch.float64)

    def add(self, start: int, teacher: Predictions, student: Predictions, wanted: Tensor) -> None:
        """Adds consecutive predictions of one segment, the first of them for token `start` + 1.

        wanted: true tokens int64 [n]. Predictions (256, 49152) of both, (256,).
        """
        found = -student.logs.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
        self.nll[start : start + len(wanted)] += found.double().cpu()
        self.positions += len(wanted)
        if student is teacher:
            self.same += len(wanted)
            return
        self.divergence += teacher.divergence(student)
        self.same += int((student.likeliest == teacher.likeliest).sum())

    def pool(self, group: Group) -> None:
        """Adds up what the ranks of a group have, each on its own segments."""
        sums = group.total([self.divergence, self.same, self.positions, *self.nll.tolist()])
        self.divergence, self.same, self.positions = sums[0], round(sums[1]), round(sums[2])
        self.nll = torch.tensor(sums[3:], dtype=torch.float64)

    @property
    def perplexity(self) -> float:
        """Over all positions."""
        return perplexity(float(self.nll.sum()) / self.positions)

    @property
    def mean_divergence(self) -> float:
        """KL(teacher || student) per position, nats."""
        return self.divergence / self.positions

    @property
    def top1(self) -> float:
        """Share of the positions where both find the same token likeliest."""
        return self.same / self.positions

    def by_position(self) -> list[dict[str, float]]:
        """Perplexity of positions in ranges that double: [{"first": 1, "last": 1, "perplexity": 812.4}, ...]."""
        segments = self.positions // len(self.nll)
        return [
            {"first": first, "last": last, "perplexity": perplexity(float(self.nll[first - 1 : last].mean()) / segments)}
            for first, last in octaves(len(self.nll))
        ]

    @property
    def finite(self) -> bool:
        """False when a prediction held NaN, or was impossible."""
        return bool(torch.isfinite(self.nll).all()) and math.isfinite(self.divergence)
