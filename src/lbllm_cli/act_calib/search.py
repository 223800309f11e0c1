"""Where the activation quantizers start: a search over table shapes on a sample of activations.

A shape is the level counts and integer ratios of one knee table. Found on a sample: per token-group the error of every shape of
a grid, the pair of tables whose smaller error is least in sum, then steps of one count or ratio while they help. Nothing is
clipped at the start: factors below 1 that lowered the squared error of keys raised the block's (0.0045 -> 0.0078 on block 8 of
SmolLM2-135M), since the few large entries of a key decide the attention.
"""

from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

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


def _errors(x: Tensor, shapes: list[Shape]) -> Tensor:
    """Squared error of each group with each shape alone: x [groups, size] -> [shapes, groups]."""
    backend = backend_of(x.device)
    if backend.kernels is None:
        each = (backend.quantized(x, tables_of([shape], x.device), torch.float32).values for shape in shapes)
        return torch.stack([values.sub_(x).square_().sum(-1) for values in each])
    tables, transfers = tables_of(shapes), backend.transfers(x.device)
    assert tables.zero is not None
    levels, zero = (tensor if transfers is None else transfers.small(tensor) for tensor in (tables.levels, tables.zero))
    return backend.kernels.table_errors(x, levels, zero)


def _score(mine: Tensor, other: Tensor | None) -> Tensor:
    """Error of a table over all groups, [..., groups] -> [...], beside another one of which each group takes the better."""
    return (mine if other is None else torch.minimum(mine, other)).sum(-1)


def _row(table: Tensor, number: Tensor) -> Tensor:
    """A row by its number, int64 [], which indexing would wait for."""
    return table.index_select(0, number.view(1))[0]


class Sample(NamedTuple):
    """What to find tables for. x: token-groups, float32 [groups, size]. tables: 1 or 2."""

    x: Tensor
    bits: int
    tables: int


def fit_knees(samples: list[Sample]) -> list[list[Shape]]:
    """Shapes of the tables for each of some samples. Deterministic.

    All are searched for side by side: the device is waited for once for a choice of each, nine times in all.
    """
    searches = [_search(sample) for sample in samples]
    asked: dict[int, Tensor] = {index: next(search) for index, search in enumerate(searches)}
    found: dict[int, list[Shape]] = {}
    while asked:
        answers = torch.stack(list(asked.values())).tolist()
        for index, answer in zip(list(asked), answers, strict=True):
            try:
                asked[index] = searches[index].send(answer)
            except StopIteration as ended:
                found[index] = ended.value
                del asked[index]
    return [found[index] for index in range(len(samples))]


def _search(sample: Sample) -> Generator[Tensor, list[int], list[Shape]]:
    """One search. Yields choices as they are on the device, int64 [2], and is sent them as numbers; returns the shapes."""
    x, bits, tables = sample
    shapes = list(grid(bits))
    table = _errors(x, shapes)
    chosen = [_score(table, None).argmin()]
    if tables == 2:
        chosen.append(_score(table, _row(table, chosen[0])).argmin())
        for _ in range(_ROUNDS):
            for turn in (0, 1):
                chosen[turn] = _score(table, _row(table, chosen[1 - turn])).argmin()
    numbers = yield torch.stack([chosen[0], chosen[-1]])
    best, errors = [shapes[number] for number in numbers[:tables]], [table[number] for number in numbers[:tables]]
    for _ in range(_ROUNDS):
        before = list(best)
        for turn in range(tables):
            other = errors[1 - turn] if tables == 2 else None
            near = [shape for shape in _neighbours(best[turn]) if shape.valid() and shape != best[turn]]
            tried = _errors(x, near)
            scores = torch.stack([_score(row, other) for row in tried])
            better, number = yield torch.stack([(scores.min() < _score(errors[turn], other)).long(), scores.argmin()])
            if better:
                best[turn], errors[turn] = near[number], tried[number]
        if best == before:
            break
    return best
