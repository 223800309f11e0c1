"""Levels of 2 bits: the nearest of the table, a byte for a group, a scale for each row."""

import pytest
import torch

from lbllm_cli.format.level_table import pack_places, table_levels, unpack_places
from lbllm_cli.format.levels import level_max, level_values, project_levels, stored_grid
from lbllm_cli.format.names import HALF_WIDTHS, MEANS, TABLE_LEVELS
from lbllm_cli.format.weights import PackedWeight, expected_bits, pack_codes, ranks_from_codes

BY_RANK = [[row[code] for code in (2, 0, 1, 3)] for row in TABLE_LEVELS]


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("ascending", "table"), [(True, BY_RANK), (False, TABLE_LEVELS)])
def test_nearest_levels_against_brute_force(ascending, table):
    scale = (torch.rand(400, generator=_generator(1)) * 0.02 + 1e-3).half()
    near = torch.tensor(table)[torch.randint(0, 256, (400,), generator=_generator(2))]
    levels = (near + 4 * torch.randn(400, 4, generator=_generator(3))) * scale.float().unsqueeze(1)
    found = table_levels(levels, scale, ascending)
    assert found.dtype == torch.int8
    for row, step, stored in zip(levels.double().tolist(), scale.double().tolist(), found.tolist(), strict=True):
        errors = [sum((level - step * value) ** 2 for level, value in zip(row, entry, strict=True)) for entry in table]
        # Measured: 0. Of two that are equally near either may be taken.
        assert errors[[list(entry) for entry in table].index(stored)] <= min(errors) * (1 + 1e-5)
    assert len(set(map(tuple, found.tolist()))) > 180  # measured 193


def test_the_first_of_equally_near_ones():
    # Means -1 and 3, half-widths 12 and 41: (12, 38), (9, 41) and (15, 41) are as near.
    found = table_levels(torch.tensor([[-38.0, -13.0, 11.0, 44.0]]), torch.ones(1), ascending=True)
    assert found.tolist() == [[-35, -13, 11, 41]]


def test_inner_levels_lie_between_outer_ones_and_fit_in_a_byte():
    assert (len(MEANS), len(HALF_WIDTHS), len(TABLE_LEVELS), len(set(TABLE_LEVELS))) == (16, 16, 256, 256)
    assert all(row == sorted(row) and len(set(row)) == 4 for row in BY_RANK)
    assert max(abs(value) for row in BY_RANK for value in row) == level_max(2) == 127
    # Neither side is preferred.
    assert {tuple(-value for value in reversed(row)) for row in BY_RANK} == set(map(tuple, BY_RANK))


def test_every_group_is_a_byte_of_its_own():
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    levels = unpack_places(every)
    assert (levels.shape, levels.dtype) == ((256, 4), torch.int8)
    for byte, row in enumerate(levels.tolist()):
        (inner, outer), (near, far) = MEANS[byte % 16], HALF_WIDTHS[byte // 16]
        assert row == [inner - near, inner + near, outer - far, outer + far]
    assert torch.equal(pack_places(levels), every)
    assert pack_places(torch.tensor([-10, 8, -32, 38], dtype=torch.int8)).tolist() == [0x50]
    assert unpack_places(torch.tensor([0x50], dtype=torch.uint8)).tolist() == [-10, 8, -32, 38]


@pytest.mark.parametrize("ascending", [True, False])
def test_levels_on_the_grid_keep_their_values(ascending):
    bytes_ = torch.randint(0, 256, (6, 9, 1), generator=_generator(3), dtype=torch.uint8)
    scale = (torch.rand(6, 1, generator=_generator(4)) * 0.02 + 1e-3).half()
    scale[0] = 3 * 2.0**-24  # subnormal
    levels = unpack_places(bytes_)
    if ascending:
        levels = ranks_from_codes(torch.zeros(6, 9, dtype=torch.uint8), levels)[1]
    again, found = project_levels(level_values(levels, scale.expand(6, 9)), 2, scale, ascending)
    assert torch.equal(again, levels)
    assert torch.equal(found, scale.expand(6, 9))


def test_a_scale_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="levels reach"):
        project_levels(torch.ones(2, 3, 4), 2, torch.full((2, 1), torch.inf).half())


@pytest.mark.parametrize("level", [float("nan"), float("inf"), float("-inf")])
def test_levels_that_are_not_finite_are_refused_and_where_nobody_waits_show(level):
    levels, scale = torch.randn(2, 3, 4, generator=_generator(8)).sort(-1).values, torch.full((2, 1), 0.01).half()
    levels[1, 2, 3] = level
    with pytest.raises(ValueError, match="levels reach"):
        project_levels(levels, 2, scale)
    found = level_values(*stored_grid(levels, 2, scale))
    assert torch.isnan(found).nonzero().tolist() == [[1, 2, k] for k in range(4)]


@pytest.mark.parametrize(("out", "inn", "size"), [(6, 100, 16), (5, 64, 32), (1, 1536, 16), (3, 40, 64)])
def test_a_packed_weight_comes_back(out, inn, size):
    groups = -(-inn // size)
    codes = torch.randint(0, 4, (out, inn), generator=_generator(5), dtype=torch.uint8)
    levels = unpack_places(torch.randint(0, 256, (out, groups, 1), generator=_generator(6), dtype=torch.uint8))
    scale = (torch.rand(out, 1, generator=_generator(7)) * 0.02).half()
    weight = PackedWeight(pack_codes(codes, size), levels, scale.expand(out, groups), inn, 2)
    tensors = weight.to_tensors("p")
    assert tensors["p.levels"].shape == (out, groups, 1)
    assert tensors["p.scale"].shape == (out, 1)
    found = PackedWeight.from_tensors(tensors, "p", inn)
    assert (found.level_bits, found.group_size) == (2, size)
    assert torch.equal(found.values(), weight.values())
    for row, column in ((0, 0), (out - 1, inn - 1)):
        level = levels[row, column // size, int(codes[row, column])]
        assert float(found.values()[row, column]) == float(level) * float(scale[row, 0])
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert expected_bits([(out, inn)], size, 2) * out * inn == pytest.approx(8 * held, rel=1e-12)
    halves = found.split([1, out - 1]) if out > 1 else [found]
    assert all(torch.equal(part.row_scale, part.scale[:, :1]) for part in halves)


def test_bits_by_hand():
    # 2 bits of codes, 8 bits for 16 weights, 16 for a row of 4,096.
    assert expected_bits([(4096, 4096)], 16, 2) == 2 + 8 / 16 + 16 / 4096
