"""Where the activation quantizers start: a search over table shapes on a sample of activations.

A shape is the level counts and integer ratios of one knee table. Found on a sample: per token-group the error of every shape of
a grid, the pair of tables whose smaller error is least in sum, then steps of one count or ratio while they help. Nothing is
clipped at the start: factors below 1 that lowered the squared error of keys raised the block's (0.0045 -> 0.0078 on block 8 of
SmolLM2-135M), since the few large entries of a key decide the attention.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lbllm_cli.format.activations import Tables
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.training.knees import Shape, tables_of

_RATIOS = (2, 3, 4, 6, 9, 13, 18)
_ROUNDS = 4
# Token-groups in the sample: on inputs of SmolLM2-135M 1,024 of 64 found tables as good as 4,096, in a third of the time.
SAMPLE = 1024


def grid(bits: int) -> Iterator[Shape]:
    """Shapes to begin with: coarse levels on both sides alike or one or two apart, fine ones about zero, one ratio."""
    levels = 2**bits
    most = levels // 4
    stride = max(1, most // 4)
    for low in range(0, most + 1, stride):
        for high in range(max(0, low - 2 * stride), min(most, low + 2 * stride) + 1, stride):
            fine = levels - 1 - low - high
            for below in sorted({fine // 2, fine - fine // 2}):
                shapes = (Shape(below, fine - below, low, high, ratio, ratio) for ratio in (_RATIOS if low or high else (1,)))
                yield from (shape for shape in shapes if shape.valid())


def _neighbours(shape: Shape) -> Iterator[Shape]:
    """Shapes one step away, with the same number of levels."""
    f_low, f_high, c_low, c_high, r_low, r_high = shape
    for step in (-1, 1):
        yield shape._replace(fine_low=f_low + step, fine_high=f_high - step)
        yield shape._replace(fine_low=f_low + step, coarse_low=c_low - step)
        yield shape._replace(fine_high=f_high + step, coarse_high=c_high - step)
        yield shape._replace(coarse_low=c_low + step, coarse_high=c_high - step)
        yield shape._replace(ratio_low=r_low + step, ratio_high=r_high + step)
        yield shape._replace(ratio_low=r_low + step)
        yield shape._replace(ratio_high=r_high + step)


def _errors(x: Tensor, tables: Tables) -> Tensor:
    """Squared error of each group, [groups]."""
    return backend_of(x.device).quantized(x, tables, torch.float32).values.sub_(x).square_().sum(-1)


def _score(mine: Tensor, other: Tensor | None) -> Tensor:
    """Error of a table over all groups, [..., groups] -> [...], beside another one of which each group takes the better."""
    return (mine if other is None else torch.minimum(mine, other)).sum(-1)


def fit_knee(x: Tensor, bits: int, tables: int) -> list[Shape]:
    """Shapes of `tables` tables (1 or 2) for a sample of token-groups, float32 [groups, size]. Deterministic."""
    shapes = list(grid(bits))
    table = torch.stack([_errors(x, tables_of([shape], x.device)) for shape in shapes])
    chosen = [int(_score(table, None).argmin())]
    if tables == 2:
        chosen.append(int(_score(table, table[chosen[0]]).argmin()))
        for _ in range(_ROUNDS):
            for turn in (0, 1):
                chosen[turn] = int(_score(table, table[chosen[1 - turn]]).argmin())
    best, errors = [shapes[index] for index in chosen], [table[index] for index in chosen]
    for _ in range(_ROUNDS):
        before = list(best)
        for turn in range(tables):
            other = errors[1 - turn] if tables == 2 else None
            least = float(_score(errors[turn], other))
            for shape in _neighbours(best[turn]):
                if shape.valid() and shape != best[turn]:
                    found = _errors(x, tables_of([shape], x.device))
                    score = float(_score(found, other))
                    if score < least:
                        best[turn], errors[turn], least = shape, found, score
        if best == before:
            break
    return best
