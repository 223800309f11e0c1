"""Errors of a block's output, with massive tokens told apart."""

import math

import torch
from torch import Tensor

from lbllm_cli.parallel.group import Group
from lbllm_cli.runtime.backend import backend_of

# Attention sinks (position 0 above all) have hidden states tens to hundreds of times larger than other tokens.
_MASSIVE = 10.0
# A token this many times the usual squared error off pulls ten times as hard as a usual one, and no harder from there on.
_FAR_OFF = 100.0


def massive_tokens(hidden: Tensor) -> Tensor:
    """Tokens whose norm exceeds ten times the median norm: hidden [rows, length, hidden] -> bool [rows, length]."""
    norms = hidden.float().norm(dim=-1)
    return norms > _MASSIVE * norms.median()


def channel_scale(hidden: Tensor, cap: float) -> Tensor:
    """What channels of hidden states are multiplied by, so that none has more than `cap` times the median channel's energy.

    hidden: [rows, length, hidden], of which massive tokens do not count. Returns float32 [hidden], at most 1; all 1 where the
    median channel has no energy. Energies 4, 1, 1000, cap 100 -> 1, 1, sqrt(0.4).
    """
    ordinary = ~massive_tokens(hidden)
    # Row by row: in float32 all at once are several times the states themselves.
    rows = [torch.where(kept.unsqueeze(-1), row.float(), 0).square().sum(0) for row, kept in zip(hidden, ordinary, strict=True)]
    energy = torch.stack(rows).sum(0)
    usual = energy.median()
    scale = (cap * usual / energy.clamp(min=1e-30)).clamp(max=1).sqrt()
    return torch.where(usual > 0, scale, 1)


def sum_where(values: Tensor, kept: Tensor) -> Tensor:
    """Sum of the values that are kept, []: values float, kept bool, of one shape."""
    # To pick them out a device would have to be asked how many they are.
    return values[kept].sum() if backend_of(values.device).shares_ram else torch.where(kept, values, 0).sum()


def robust_error(error: Tensor, usual: float) -> Tensor:
    """Huber's loss on the distance of each token: squared errors up to 100 times the usual one, linear in the distance beyond.

    error: squared distances [...]. usual: the mean one of ordinary tokens. (4.0, 900.0), usual 1.0 -> (4.0, 500.0).
    """
    limit = _FAR_OFF * usual
    return torch.where(error > limit, 2 * (limit * error.clamp(min=limit)).sqrt() - limit, error)


class BlockError:
    """Squared distance of the student's hidden states from the teacher's, relative to the teacher's, summed over batches.

    ordinary: without massive tokens, which carry nearly all of the energy of some blocks (SmolLM2-135M block 11: 99.9 %).
    Sums stay on the device until one is asked for.
    """

    def __init__(self) -> None:
        self.tokens = 0
        # float64 [5]: error, energy, both of ordinary tokens, and the sum over all tokens of the cosine between both.
        self._totals: Tensor | None = None
        self._read: tuple[float, ...] | None = (0.0,) * 5

    def add(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Adds one batch of block outputs, both [rows, length, hidden].

        Returns the squared distance of each token, float32 [rows, length].
        """
        error = (student.float() - teacher.float()).square().sum(-1)
        energy = teacher.float().square().sum(-1)
        cosine = torch.nn.functional.cosine_similarity(student.float(), teacher.float(), dim=-1)
        ordinary = ~massive_tokens(teacher)
        parts = (error.sum(), energy.sum(), sum_where(error, ordinary), sum_where(energy, ordinary), cosine.sum())
        sums = torch.stack(parts).double()
        self._totals = sums if self._totals is None else self._totals + sums
        self._read = None
        self.tokens += cosine.numel()
        return error

    def _sums(self) -> tuple[float, ...]:
        if self._read is None:
            assert self._totals is not None
            self._read = tuple(self._totals.tolist())
        return self._read

    def pool(self, group: Group) -> None:
        """Adds up what the ranks of a group have, each of its own sequences."""
        tokens, *sums = group.total([self.tokens, *self._sums()])
        self.tokens, self._read = round(tokens), tuple(sums)

    @property
    def error(self) -> float:
        """Sum over all tokens of the squared distance."""
        return self._sums()[0]

    @property
    def energy(self) -> float:
        """Sum over all tokens of the teacher's squared norm."""
        return self._sums()[1]

    @property
    def ordinary_error(self) -> float:
        """As `error`, over ordinary tokens."""
        return self._sums()[2]

    @property
    def ordinary_energy(self) -> float:
        """As `energy`, over ordinary tokens."""
        return self._sums()[3]

    @property
    def relative(self) -> float:
        """Over all tokens."""
        return self.error / max(self.energy, 1e-30)

    @property
    def relative_ordinary(self) -> float:
        """Over ordinary tokens."""
        return self.ordinary_error / max(self.ordinary_energy, 1e-30)

    @property
    def cosine(self) -> float:
        """Mean cosine between a token's two hidden states."""
        return self._sums()[4] / max(self.tokens, 1)

    @property
    def decibels(self) -> float:
        """Signal to noise over ordinary tokens, 10 log10(energy / error); infinite where there is no error."""
        return -10 * math.log10(self.relative_ordinary) if self.ordinary_error else math.inf

    @property
    def finite(self) -> bool:
        """False when an output held NaN or infinity."""
        return math.isfinite(self.error) and math.isfinite(self.energy)
