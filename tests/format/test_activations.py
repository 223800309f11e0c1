"""The activation quantizer against a slow reference, its integer path, its gradients and the search it starts from."""

import itertools
import math

import pytest
import torch

from lbllm_cli.act_calib.search import Shape, fit_knee, grid, tables_of
from lbllm_cli.format.activations import (
    LATTICE_MAX,
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
from lbllm_cli.runtime.cpu.quantizer import quantized
from lbllm_cli.training.act_ste import fake_quantize, soft_quantize

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


@pytest.mark.parametrize("bits", range(3, 9))
def test_tables_of_every_width_fit_the_lattice(bits):
    for shape in itertools.islice(grid(bits), 0, None, 7):
        levels = shape.levels()
        assert len(levels) == 2**bits
        assert levels == sorted(set(levels))
        assert levels[0] == 0
        assert shape.zero in levels
        assert levels[-1] == shape.top <= (LATTICE_MAX if bits < 8 else 255)
    x = draw(64, 32)
    shapes = fit_knee(x, bits, 2)
    error = float((dequantize(quantize(x, tables_of(shapes)), tables_of(shapes).levels) - x).square().sum() / x.square().sum())
    # measured 0.0251, 0.00617, 0.00158, 0.000468, 0.000381, 0.0000831
    assert error < {3: 0.05, 4: 0.012, 5: 0.003, 6: 0.0008, 7: 0.0005, 8: 0.0001}[bits]


def test_the_search_finds_what_brute_force_finds():
    """3 bits, one table: every shape with equal ratios, against the search."""
    x = draw(128, 16, seed=3)

    def error(shape: Shape) -> float:
        tables = tables_of([shape])
        return float((dequantize(quantize(x, tables), tables.levels) - x).square().sum())

    everything = [
        Shape(f_low, f_high, c_low, 7 - f_low - f_high - c_low, ratio, ratio)
        for f_low in range(8) for f_high in range(8 - f_low) for c_low in range(8 - f_low - f_high) for ratio in range(1, 20)
    ]  # fmt: skip
    least = min(error(shape) for shape in everything if shape.valid())
    (found,) = fit_knee(x, 3, 1)
    assert error(found) <= 1.01 * least  # measured 1.000


def test_two_tables_are_better_than_one():
    x = torch.cat([draw(256, 64), torch.randn(256, 64, generator=torch.Generator().manual_seed(4))])
    errors = []
    for count in (1, 2):
        tables = tables_of(fit_knee(x, 4, count))
        errors.append(float((dequantize(quantize(x, tables), tables.levels) - x).square().sum()))
    assert errors[1] < 0.9 * errors[0]  # measured 0.869


@pytest.mark.parametrize("tables", [tables_of([ONE, TWO]), uniform()], ids=["knee", "uniform"])
def test_fake_quantization_is_the_quantizer_bit_for_bit(tables):
    x = draw(3, 5, 64)
    for clip in (tables.clip, tables.clip * 0.8):
        clipped = tables._replace(clip=clip)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(fake_quantize(x, clip, clipped, dtype), quantized(x, clipped, dtype).values)


def surrogate(x0: torch.Tensor, x: torch.Tensor, clip0: torch.Tensor, clip: torch.Tensor, tables: Tables) -> torch.Tensor:
    """The declared surrogate of FakeQuantize in float64: codes, tables taken and extremes stay as at (x0, clip0)."""
    codes = quantize(x0.float(), tables._replace(clip=clip0.float()))
    levels = tables.levels.double()
    rows = []
    for n in range(len(x0)):
        high, low = x0[n].max().clamp(min=0), (-x0[n].min()).clamp(min=0)
        k = int(codes.table[n])
        top = float(levels[k, -1])

        def reach(c: torch.Tensor, high=high, low=low, k=k, top=top) -> torch.Tensor:
            if tables.zero is None:
                return (c[0, 0] * high + c[0, 1] * low) / top
            z = float(tables.zero[k])
            return torch.maximum(c[k, 0] * high / (top - z), c[k, 1] * low / z)

        grown = reach(clip) / reach(clip0)
        zero, step = float(codes.zero[n]), float(codes.step[n])
        values = step * (levels[k][codes.codes[n].long()] - zero)
        place = x0[n] / step + zero
        over, under = place > top + 0.5, place < -0.5
        side = [grown, grown] if tables.zero is not None else [clip[0, 0] / clip0[0, 0], clip[0, 1] / clip0[0, 1]]
        inner = values + (x[n] - x0[n]) + (grown - 1) * (values - x0[n])
        rows.append(torch.where(over, values * side[0], torch.where(under, values * side[1], inner)))
    return torch.stack(rows)


@pytest.mark.parametrize("tables", [tables_of([ONE, TWO]), tables_of([ONE]), uniform()], ids=["two", "one", "uniform"])
def test_gradients_are_those_of_the_surrogate(tables):
    x0 = draw(6, 24, seed=8)
    clip0 = torch.full_like(tables.clip, 0.62)
    x, clip = x0.clone().requires_grad_(), clip0.clone().requires_grad_()
    upstream = draw(6, 24, seed=9)
    (fake_quantize(x, clip, tables._replace(clip=clip0), torch.float32) * upstream).sum().backward()
    assert x.grad is not None
    assert clip.grad is not None
    assert 0 < int((x.grad == 0).sum()) < x.numel() / 2  # some values are clipped
    x64, c64 = x0.double(), clip0.double()
    for parameter, gradient in ((x64, x.grad), (c64, clip.grad)):
        for index in range(parameter.numel()):
            moved = []
            for sign in (1, -1):
                shifted = parameter.clone()
                shifted.view(-1)[index] += sign * 1e-6
                arguments = (x64, shifted, c64, c64) if parameter is x64 else (x64, x64, c64, shifted)
                moved.append(float((surrogate(*arguments, tables) * upstream).sum()))
            assert float(gradient.view(-1)[index]) == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-3, abs=1e-4)


def soft(x, shapes, temperature, ratio=None, clip=None):
    tables = tables_of(shapes)
    table = quantize(x.float(), tables).table
    counts = torch.tensor([shape[:4] for shape in shapes], dtype=x.dtype)
    ratio = torch.tensor([shape[4:6] for shape in shapes], dtype=x.dtype) if ratio is None else ratio
    return soft_quantize(x, table, counts, ratio, tables.clip.to(x.dtype) if clip is None else clip, temperature)


def hard(x, shapes):
    """The deployed form before its step is refitted, with the table that each group took."""
    tables = tables_of(shapes)
    table = quantize(x, tables).table
    out = torch.empty_like(x)
    for n, row in enumerate(x):
        shape, k = shapes[int(table[n])], int(table[n])
        step = torch.maximum(row.max().clamp(min=0) / (shape.top - shape.zero), (-row.min()).clamp(min=0) / shape.zero)
        levels = tables.levels[k].float()
        place = (row / step).round() + shape.zero
        out[n] = step * (levels[snap_table(tables.levels[k])][place.long()] - shape.zero)
    return out


def test_the_soft_form_becomes_the_hard_one():
    # Odd ratios: an even one leaves places halfway between two levels, which the lattice sends down and the soft form up.
    shapes = [Shape(4, 5, 3, 3, 3, 3), Shape(7, 6, 1, 1, 15, 17)]
    x = draw(40, 32)
    expected = hard(x, shapes)
    # Through the lattice a value near the middle of a coarse step may go the other way: at most one step.
    away = (soft(x, shapes, 1e-4) - expected).abs() > 1e-3 * expected.abs().mean()
    assert float(away.float().mean()) < 0.005  # measured 0
    spread = [float((soft(x, shapes, t) - expected).abs().mean()) for t in (2.0, 0.5, 0.05)]
    assert spread[0] > spread[1] > spread[2]


def test_soft_gradients_reach_knees_and_factors():
    """Both kinds of parameters get a gradient from every side of the table."""
    shapes = [Shape(4, 5, 3, 3, 3, 4)]
    x = draw(5, 24, seed=2).double()
    ratio = torch.tensor([[3.2, 4.1]], dtype=torch.float64)
    clip = torch.tensor([[0.9, 0.8]], dtype=torch.float64)
    ratio.requires_grad_(), clip.requires_grad_()
    out = soft(x, shapes, 0.5, ratio, clip)
    (out * draw(5, 24, seed=3)).sum().backward()
    assert ratio.grad is not None
    assert clip.grad is not None
    assert bool((ratio.grad != 0).all())
    assert bool((clip.grad != 0).any())
