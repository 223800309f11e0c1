"""Levels of 2 bits: the nearest values of the table, a byte for a group, a scale for each row."""

from itertools import product

import pytest
import torch

from lbllm_cli.format.level_table import pack_places, table_levels, unpack_places
from lbllm_cli.format.levels import level_values, project_levels, stored_grid
from lbllm_cli.format.names import TABLE_LEVELS
from lbllm_cli.format.weights import PackedWeight, expected_bits, pack_codes, ranks_from_codes

# Of each code: what its level can be.
VALUES = [[sign * value for value in row] for row in TABLE_LEVELS for sign in (-1, 1)]
RANKS = [VALUES[code] for code in (2, 0, 1, 3)]


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("ascending", "tables"), [(True, RANKS), (False, VALUES)])
def test_nearest_values_against_brute_force(ascending, tables):
    scale = (torch.rand(300, generator=_generator(1)) * 0.02 + 1e-3).half()
    levels = torch.randn(300, 4, generator=_generator(2)) * 60 * scale.float().unsqueeze(1)
    found = table_levels(levels, scale, ascending)
    assert found.dtype == torch.int8
    seen = [set() for _ in range(4)]
    for row, step, stored in zip(levels.double().tolist(), scale.double().tolist(), found.tolist(), strict=True):
        for place, (level, value, table) in enumerate(zip(row, stored, tables, strict=True)):
            errors = [abs(level - step * other) for other in table]
            # Measured: 0. What lies in the middle may go either way.
            assert abs(level - step * value) <= min(errors) * (1 + 1e-6)
            seen[place].add(value)
    assert [sorted(values) for values in seen] == [sorted(table) for table in tables]


def test_the_smaller_of_two_that_are_equally_near():
    assert table_levels(torch.tensor([[-49.5, -8.5, 8.5, 49.5]]), torch.ones(1), ascending=True).tolist() == [[-41, -4, 4, 41]]


def test_tables_do_not_overlap():
    assert [value for table in RANKS for value in sorted(table)] == sorted(value for table in RANKS for value in table)
    assert max(value for table in RANKS for value in table) == 127


def test_every_group_is_a_byte_of_its_own():
    every = torch.tensor(list(product(*VALUES)), dtype=torch.int8)
    packed = pack_places(every)
    assert (packed.shape, packed.dtype) == ((256, 1), torch.uint8)
    assert len(set(packed.flatten().tolist())) == 256
    assert torch.equal(unpack_places(packed), every)
    assert pack_places(torch.tensor([-4, 13, -127, 41], dtype=torch.int8)).tolist() == [0b00_11_01_00]
    assert unpack_places(torch.tensor([0b00_11_01_00], dtype=torch.uint8)).tolist() == [-4, 13, -127, 41]


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
