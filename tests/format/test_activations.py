"""The activation quantizer against a slow reference, its integer path, its gradients and the search it starts from."""

import math

import pytest
import torch

from lbllm_cli.format.activations import (
    Tables,
    dequantize,
    join_groups,
    pack_bits,
    places,
    quantize,
    snap_table,
    split_groups,
    uniform_levels,
)
from lbllm_cli.format.names import LATTICE_MAX
from lbllm_cli.training.knees import Shape, tables_of

ONE = Shape(4, 5, 3, 3, 3, 3)
TWO = Shape(7, 6, 1, 1, 14, 17)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()


def uniform(bits: int = 4, clip: tuple[float, float] = (1.0, 1.0)) -> Tables:
    return Tables(uniform_levels(bits), None, torch.tensor([clip]))


def slow_group(values: list[float], tables: Tables, step_dtype: torch.dtype) -> list[float]:
    """One group, in Python's own numbers: the written definition, value by value."""
    high, low = max(0.0, *values), max(0.0, *(-v for v in values))
    candidates = []
    for row in range(len(tables.levels)):
        levels = [int(level) for level in tables.levels[row]]
        above, below = float(tables.clip[row, 0]), float(tables.clip[row, 1])
        for share in (1.0,) if tables.zero is None else (1.0, 0.88):
            if tables.zero is None:
                step = (high * above + low * below) / (len(levels) - 1)
                zero = max(0, min(levels[-1], round(low * below / step))) if step else 0
            else:
                zero = int(tables.zero[row])
                up = above * high / (levels[-1] - zero) if levels[-1] > zero else 0
                step = share * max(up, below * low / zero if zero else 0)
            lattice = []
            for value in values:
                place = max(0, min(levels[-1], round(value / step) + zero)) if step else zero
                lattice.append(min(levels, key=lambda level: (abs(level - place), level)) - zero)
            product = sum(value * place for value, place in zip(values, lattice, strict=True))
            refitted = product / max(1, sum(place * place for place in lattice))
            candidates.append((-product * refitted, len(candidates), refitted, lattice))
    _, _, refitted, lattice = min(candidates)
    stored = float(torch.tensor(refitted).to(step_dtype))
    return [stored * place for place in lattice]


@pytest.mark.parametrize(
    "tables",
    [
        tables_of([ONE]),
        tables_of([ONE, TWO]),
        tables_of([ONE, TWO])._replace(clip=torch.tensor([[0.7, 0.9], [0.8, 0.6]])),
        tables_of([Shape(0, 15, 0, 0, 1, 1)._replace(fine_low=1, fine_high=14)]),
        uniform(),
        uniform(3, (0.8, 0.7)),
        uniform(8),
    ],
    ids=["one table", "two tables", "clipped", "one-sided", "uniform", "uniform, 3 bits", "uniform, 8 bits"],
)
@pytest.mark.parametrize("step_dtype", [torch.float32, torch.bfloat16])
def test_against_a_slow_reference(tables, step_dtype):
    x = draw(60, 16)
    x[0], x[1], x[2] = 0, x[1].abs(), -x[2].abs()
    codes = quantize(x, tables, step_dtype)
    assert torch.equal(codes.step, codes.step.to(step_dtype).float())
    got = dequantize(codes, tables.levels)
    expected = torch.tensor([slow_group(row, tables, step_dtype) for row in x.tolist()])
    # One in float32, the other in float64: a value within 1e-7 of an edge may fall to either side. None does here.
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-7)  # measured 2.4e-7 relative


def test_integer_path_equals_the_values_bit_for_bit():
    """sum(level * T) - Z * sum(level), in integers, times the steps: what a kernel computes from codes, T and d."""
    tables = tables_of([ONE, TWO])
    x = split_groups(draw(5, 70), 16)
    codes = quantize(x, tables)
    values = dequantize(codes, tables.levels)
    lattice = places(codes, tables.levels)
    assert lattice.dtype == torch.uint8
    assert int(lattice.max()) <= LATTICE_MAX
    again = (lattice.int() - codes.zero.int().unsqueeze(-1)).float() * codes.step.unsqueeze(-1)
    assert torch.equal(values, again)
    weight = torch.randint(-127, 128, (16,), generator=torch.Generator().manual_seed(1))
    dot = (lattice.long() * weight).sum(-1) - codes.zero.long() * weight.sum()
    exact = (values.double() * weight).sum(-1)
    torch.testing.assert_close(codes.step.double() * dot, exact, rtol=1e-5, atol=1e-9)  # measured 1.1e-6


@pytest.mark.parametrize("tables", [tables_of([ONE, TWO]), uniform(), uniform(3), tables_of([Shape(1, 2, 2, 2, 2, 2)])])
def test_zero_stays_zero_and_values_are_fixed_points_of_their_step(tables):
    x = draw(40, 32)
    x[:, ::5] = 0
    x[7] = 0
    values = dequantize(quantize(x, tables), tables.levels)
    assert bool((values[x == 0] == 0).all())
    assert bool(torch.isfinite(values).all())


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e20, 1e30])
def test_extreme_scales_are_finite(scale):
    for tables in (tables_of([ONE, TWO]), uniform()):
        x = draw(8, 32) * scale
        values = dequantize(quantize(x, tables), tables.levels)
        assert bool(torch.isfinite(values).all())
        if 1e-25 < scale < 1e30:
            assert float((values - x).double().norm() / x.double().norm()) < 0.2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    for tables in (tables_of([ONE]), tables_of([ONE, TWO]), uniform()):
        x = draw(3, 32)
        x[1, 4] = bad
        values = dequantize(quantize(x, tables), tables.levels)
        assert not bool(torch.isfinite(values[1]).all())
        assert bool(torch.isfinite(values[::2]).all())


def test_each_group_takes_the_better_table():
    tables = tables_of([ONE, TWO])
    x = draw(200, 64)
    single = [Tables(tables.levels[k : k + 1], tables.zero[k : k + 1], tables.clip[k : k + 1]) for k in (0, 1)]
    errors = torch.stack([(dequantize(quantize(x, one), one.levels) - x).square().sum(-1) for one in single])
    both = quantize(x, tables)
    assert torch.equal(both.table, errors.argmin(0))
    assert 0 < int(both.table.sum()) < 200
    torch.testing.assert_close((dequantize(both, tables.levels) - x).square().sum(-1), errors.min(0).values)


def test_snap_goes_to_the_nearest_level_the_lower_on_a_tie():
    levels = torch.tensor([0, 4, 5, 6, 10, 127], dtype=torch.uint8)
    found = snap_table(levels)
    expected = [min(range(6), key=lambda k: (abs(int(levels[k]) - place), k)) for place in range(128)]
    assert found.tolist() == expected


@pytest.mark.parametrize(("width", "size"), [(64, 16), (70, 16), (8, 64), (576, 128)])
def test_groups_come_back(width, size):
    x = draw(2, 3, width)
    groups = split_groups(x, size)
    assert groups.shape == (2, 3, math.ceil(width / size), size)
    assert torch.equal(join_groups(groups, width), x)


@pytest.mark.parametrize("bits", range(3, 9))
def test_packed_codes_come_back_and_are_dense(bits):
    codes = torch.randint(2**bits, (3, 5, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, 5, 24 * bits // 8)
    from lbllm_cli.format.activations import unpack_bits

    assert torch.equal(unpack_bits(packed, bits), codes)
    stream = [(int(byte) >> k) & 1 for byte in packed[0, 0] for k in range(8)]
    assert [sum(stream[i * bits + k] << k for k in range(bits)) for i in range(24)] == codes[0, 0].tolist()
