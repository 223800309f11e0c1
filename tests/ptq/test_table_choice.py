"""The best levels of the table for known codes, against all 256 tried in Python floats."""

import torch

from lbllm_cli.format.names import TABLE_LEVELS
from lbllm_cli.ptq.table_choice import best_of_table

BY_RANK = [[row[code] for code in (2, 0, 1, 3)] for row in TABLE_LEVELS]


def _cost(levels, slope, curve):
    return sum(levels[a] * (sum(curve[a][b] * levels[b] for b in range(4)) - 2 * slope[a]) for a in range(4))


def test_the_least_of_all():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 9, 4, generator=g)
    curve = x.mT @ x
    # One level of a row costs a million times what the others do.
    curve[::3] *= torch.tensor([1.0, 1, 1, 1e3]) * torch.tensor([1.0, 1, 1, 1e3])[:, None]
    scale = (torch.rand(30, generator=g) * 0.01 + 0.02).half()
    slope = (curve @ (torch.randn(30, 4, 1, generator=g).sort(1).values)).squeeze(-1)
    found = best_of_table(slope, curve, scale)
    assert found.dtype == torch.int8
    for row, b, c, step in zip(found.tolist(), slope.tolist(), curve.tolist(), scale.tolist(), strict=True):
        costs = [_cost([step * value for value in entry], b, c) for entry in BY_RANK]
        assert BY_RANK.index(row) == costs.index(min(costs))


def test_by_hand():
    ends = torch.diag(torch.tensor([1.0, 0, 0, 1]))[None]
    assert best_of_table(torch.tensor([[-36.0, 0, 0, 40]]), ends, torch.ones(1)).tolist() == [[-36, -7, 17, 40]]


def test_the_first_of_equally_good_ones():
    assert best_of_table(torch.zeros(2, 4), torch.zeros(2, 4, 4), torch.ones(2)).tolist() == [BY_RANK[0]] * 2


def test_a_diagonal_alone_and_more_rows_than_are_looked_at_at_once():
    g = torch.Generator().manual_seed(1)
    slope, diagonal = torch.randn(5000, 4, generator=g), torch.rand(5000, 4, generator=g)
    scale = (torch.rand(5000, generator=g) * 0.01 + 0.02).half()
    found = best_of_table(slope, diagonal, scale)
    assert torch.equal(found, best_of_table(slope, diagonal.diag_embed(), scale))
    for row in (0, 4095, 4096, 4999):
        one = slice(row, row + 1)
        assert torch.equal(found[one], best_of_table(slope[one], diagonal[one], scale[one]))
