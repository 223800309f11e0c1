"""The packed format: exact round trips, and the stored grid against exact arithmetic."""

import bisect
import math
from fractions import Fraction

import pytest
import torch

from lbllm_cli.format.levels import level_values, pack_levels, project_levels, unpack_levels
from lbllm_cli.format.weights import PackedWeight, codes_from_ranks, dequantize, group_count, pack_codes, unpack_codes

SHAPES = [(3, 576, 128), (2, 100, 48), (5, 16, 16), (1, 1, 16), (4, 33, 16), (2, 128, 128)]
# Every finite float16 from zero up, in order.
HALVES = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double().tolist()


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _packed(out, inn, size, seed=0):
    """Random codes, levels and scale of a linear."""
    g = _generator(seed)
    groups = math.ceil(inn / size)
    codes = torch.randint(0, 4, (out, inn), generator=g, dtype=torch.uint8)
    levels = torch.randint(-127, 128, (out, groups, 4), generator=g).to(torch.int8)
    return codes, levels, (torch.rand(out, groups, generator=g) * 0.02).half()


def _slow_decode(weight, levels, scale, inn):
    """The documented format, one weight at a time."""
    weight, levels, scale = weight.tolist(), levels.tolist(), scale.tolist()
    size = len(weight[0][0]) * 4
    rows = []
    for r in range(len(weight)):
        row = []
        for c in range(inn):
            group, within = c // size, c % size
            code = weight[r][group][within // 4] // 4 ** (within % 4) % 4
            row.append(levels[r][group][code] * scale[r][group])
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def _slow_project(levels):
    """Smallest float16 not below max / 127 less 2e-6, in exact fractions; levels rounded against it, halves to even."""
    scale = HALVES[bisect.bisect_left(HALVES, Fraction(max(abs(v) for v in levels)) / 127 * (1 - Fraction(2, 10**6)))]
    return [max(-127, min(127, round(Fraction(v) / Fraction(scale)))) if scale else 0 for v in levels], scale


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_pack_unpack(out, inn, size):
    codes = _packed(out, inn, size)[0]
    before = codes.clone()
    packed = pack_codes(codes, size)
    assert packed.dtype == torch.uint8
    assert packed.shape == (out, math.ceil(inn / size), size // 4)
    assert packed.shape != codes.shape
    back = unpack_codes(packed, inn)
    assert back.dtype == torch.uint8
    assert torch.equal(back, before)
    assert torch.equal(codes, before)


def test_bit_order():
    codes = torch.tensor([[1, 2, 3, 0, 3, 3, 3, 3, 0, 0, 0, 1, 2, 0, 0, 0, 2, 1]], dtype=torch.uint8)
    # 1 + 2*4 + 3*16 = 57, all ones = 255, 1*64 = 64, 2; then the ragged group: 2 + 1*4 = 6 and padding.
    assert pack_codes(codes, 16).tolist() == [[[57, 255, 64, 2], [6, 0, 0, 0]]]


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_decode_against_loop(out, inn, size):
    codes, levels, scale = _packed(out, inn, size, seed=1)
    packed = pack_codes(codes, size)
    found = PackedWeight(packed, levels, scale, inn).values()
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), _slow_decode(packed, levels, scale, inn))
    assert torch.equal(dequantize(codes, levels, scale, size), found)


def test_level_values_are_exact():
    # Every level against scales of all sizes, subnormal ones included: no product is rounded.
    levels = torch.arange(-127, 128).to(torch.int8)
    for scale in torch.tensor([2.0**-24, 3 * 2.0**-24, 0.001, 0.0123, 1.0, 65504.0]).half():
        values = level_values(levels.view(1, -1), scale.view(1))
        assert values.double().tolist() == [[int(v) * float(scale) for v in levels]]


@pytest.mark.parametrize("inn", [1, 15, 16, 17, 100, 576])
@pytest.mark.parametrize("size", [16, 48, 128])
def test_group_count(inn, size):
    assert group_count(inn, size) == len(range(0, inn, size))


def test_project_levels_against_fractions():
    g = _generator(2)
    magnitude = 10 ** (torch.rand(300, 1, generator=g) * 14 - 8)  # 1e-8 to 1e6: subnormal scales to nearly the largest
    wanted = torch.randn(300, 4, generator=g) * magnitude
    levels, scale = project_levels(wanted)
    assert levels.dtype == torch.int8
    assert scale.dtype == torch.float16
    assert int(levels.short().abs().max()) <= 127
    slow = [_slow_project(row) for row in wanted.double().tolist()]
    assert levels.tolist() == [row for row, _ in slow]
    assert scale.double().tolist() == [s for _, s in slow]
    assert bool((scale.double() * 127 >= wanted.double().abs().amax(1) * (1 - 2.1e-6)).all())
    # Measured: 0.4995 of a step at worst.
    error = (level_values(levels, scale).double() - wanted.double()).abs()
    assert bool((error <= 0.5003 * scale.double().unsqueeze(1)).all())


def test_project_levels_next_to_a_boundary():
    scale = torch.tensor([2.0**-24, 0.01, 1.0, 1000.0]).half()
    top = 127 * scale.float()
    for largest in (top, torch.nextafter(top, top * 0), torch.nextafter(top, top * 2), -top):
        wanted = torch.stack([largest, largest / 2, largest / 4, largest * 0], 1)
        levels, found = project_levels(wanted)
        assert int(levels.short().abs().max()) <= 127
        # Above the boundary the quotient may round onto it: then 127 steps miss the largest level by its last bit.
        assert bool((found.double() * 127 * (1 + 2.0**-23) >= largest.double().abs()).all())
        assert bool(((level_values(levels, found) - wanted).abs() <= 0.5 * found.float().unsqueeze(1)).all())
        if largest is top or largest is -top:
            assert torch.equal(found, scale)
            assert levels[:, 0].abs().tolist() == [127] * 4


def test_project_tiny_and_zero():
    tiny = torch.tensor([[1e-9, -1e-9, 0, 0], [1e-7, 5e-8, -1e-7, 0], [0.0, 0, 0, 0]])
    levels, scale = project_levels(tiny)
    smallest = 2.0**-24
    assert scale.tolist() == [smallest, smallest, 0.0]
    assert levels.tolist() == [[0, 0, 0, 0], [2, 1, -2, 0], [0, 0, 0, 0]]
    assert torch.equal(level_values(levels, scale)[2], torch.zeros(4))


def test_project_too_large():
    largest = 127.0 * 65504
    levels, scale = project_levels(torch.tensor([[-largest, 0, 1, largest]]))
    assert (levels.tolist(), scale.tolist()) == ([[-127, 0, 0, 127]], [65504.0])
    for bad in (largest * 1.001, math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match="at most"):
            project_levels(torch.tensor([[[0.0, 1, 2, bad]], [[0.0, 1, 2, 3]]]))


def test_weights_on_the_grid_come_back_exactly():
    g = _generator(3)
    rows, inn, size = 40, 100, 48
    groups = group_count(inn, size)
    levels = torch.stack([torch.randperm(254, generator=g)[:4] - 127 for _ in range(rows * groups)]).sort(1).values
    levels[:, 3] = 127
    levels = levels.view(rows, groups, 4).to(torch.int8)
    scale = (torch.rand(rows, groups, generator=g) * 0.02).half()
    scale[:3] = 2.0**-24 * torch.tensor([[1.0], [2], [5]]).half()
    ranks = torch.randint(0, 4, (rows, inn), generator=g, dtype=torch.uint8)
    weights = dequantize(ranks, levels, scale, size)
    found, found_scale = project_levels(level_values(levels, scale))
    assert torch.equal(found, levels)
    assert torch.equal(found_scale, scale)
    codes, by_code = codes_from_ranks(ranks, found, found_scale)
    assert torch.equal(PackedWeight(pack_codes(codes, size), by_code, found_scale, inn).values(), weights)


def test_code_order():
    # Bitmap (code // 2) 0 is the inner pair, 1 the outer one; sign (code % 2) 1 is the larger of a pair.
    ranks = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    levels = torch.tensor([[[-100, -20, 30, 90]]], dtype=torch.int8)
    codes, by_code = codes_from_ranks(ranks, levels, torch.ones(1, 1).half())
    assert codes.tolist() == [[2, 0, 1, 3]]
    assert by_code.tolist() == [[[-20, 30, -100, 90]]]
    assert codes.dtype == torch.uint8


def test_codes_keep_the_weights():
    ranks, levels, scale = _packed(6, 100, 48, seed=4)
    levels = levels.sort(2).values
    codes, by_code = codes_from_ranks(ranks, levels, scale)
    assert torch.equal(dequantize(codes, by_code, scale, 48), dequantize(ranks, levels, scale, 48))


def test_codes_refuse_unsorted_levels():
    ranks = torch.zeros(1, 4, dtype=torch.uint8)
    for bad in ([1, 0, 2, 3], [0, 1, 3, 2]):
        with pytest.raises(ValueError, match="ascend"):
            codes_from_ranks(ranks, torch.tensor([[bad]], dtype=torch.int8), torch.ones(1, 1).half())
    with pytest.raises(ValueError, match="one scale"):
        codes_from_ranks(ranks, torch.tensor([[[0, 1, 2, 3]]], dtype=torch.int8), torch.ones(1).half())


def test_levels_one_rounding_error_off_the_grid_return_to_it():
    # A weighted mean of equal levels comes back one float32 step away; a larger scale would move all four levels.
    scale = torch.tensor([2.0**-24, 0.01, 1.0]).half()
    grid = torch.tensor([127.0, -50.0, 3.0, 90.0]) * scale.float().unsqueeze(1)
    levels, found = project_levels(grid * (1 + 1.2e-7))
    assert torch.equal(found, scale)
    assert levels.tolist() == [[127, -50, 3, 90]] * 3


def test_levels_of_4_bits_against_brute_force():
    """No scale that puts the largest level on 7, 6 or 5, or a fifth of a step beside it, has a smaller error."""
    g = _generator(5)
    magnitude = 10 ** (torch.rand(200, 1, generator=g) * 6 - 4)
    wanted = torch.randn(200, 4, generator=g) * magnitude
    levels, scale = project_levels(wanted, 4)
    assert levels.dtype == torch.int8
    assert int(levels.short().abs().max()) <= 7
    found = (level_values(levels, scale).double() - wanted.double()).square().sum(1)
    chosen = set()
    for row, error in zip(wanted.double().tolist(), found.tolist(), strict=True):
        errors = []
        for top in (7.2, 7, 6.8, 6.2, 6, 5.8, 5.2, 5, 4.8):
            step = bisect.bisect_left(HALVES, abs(max(row, key=abs)) / top)
            # The nearest float16 is this one or the one before it.
            tried = [HALVES[i] for i in (step - 1, step)]
            step = min(tried, key=lambda s, top=top: abs(s - abs(max(row, key=abs)) / top))
            errors.append(sum((max(-7, min(7, round(x / step))) * step - x) ** 2 for x in row))
        # Measured: 0. Of places that are equally good float32 may take the other.
        assert abs(error - min(errors)) <= 1e-6 * sum(x * x for x in row)
        chosen.add(errors.index(min(errors)))
    assert len(chosen) == 9


def test_nine_places_are_better_than_one():
    g = _generator(8)
    levels = torch.tensor([-1.5, -0.45, 0.45, 1.5]) + torch.randn(20000, 4, generator=g) * torch.tensor([0.25, 0.15, 0.15, 0.25])
    found = (level_values(*project_levels(levels, 4)) - levels).square().sum()
    step = levels.abs().amax(1, keepdim=True) / 7
    # Measured: 0.60.
    assert found < 0.65 * ((levels / step).round() * step - levels).square().sum()


def test_levels_on_the_grid_of_4_bits_keep_their_values():
    g = _generator(6)
    levels = torch.randint(-7, 8, (500, 4), generator=g).to(torch.int8)
    scale = (torch.rand(500, generator=g) * 0.02).half()
    levels, scale = project_levels(level_values(levels, scale), 4)
    again = project_levels(level_values(levels, scale), 4)
    assert torch.equal(again[0], levels)
    assert torch.equal(again[1], scale)


def test_levels_of_4_bits_two_to_a_byte():
    every = torch.cartesian_prod(*[torch.tensor([-8, -7, -1, 0, 1, 7], dtype=torch.int8)] * 4)
    packed = pack_levels(every)
    assert packed.dtype == torch.uint8
    for row, (first, second) in zip(every.tolist(), packed.tolist(), strict=True):
        assert [first & 15, first >> 4, second & 15, second >> 4] == [level % 16 for level in row]
    assert torch.equal(unpack_levels(packed), every)
    assert pack_levels(torch.tensor([-7, -1, 1, 7], dtype=torch.int8)).tolist() == [0xF9, 0x71]


@pytest.mark.parametrize(("bits", "shape", "dtype"), [(8, (6, 3, 4), torch.int8), (4, (6, 3, 2), torch.uint8)])
def test_a_file_says_by_itself_how_many_bits_levels_have(bits, shape, dtype):
    codes, levels, scale = _packed(6, 100, 48, seed=7)
    levels = torch.where(levels > 0, levels % 8, -(-levels % 8)).to(torch.int8) if bits == 4 else levels
    weight = PackedWeight(pack_codes(codes, 48), levels, scale, 100, bits)
    tensors = weight.to_tensors("p")
    assert (tensors["p.levels"].shape, tensors["p.levels"].dtype) == (shape, dtype)
    found = PackedWeight.from_tensors(tensors, "p", 100)
    assert found.level_bits == bits
    assert torch.equal(found.values(), weight.values())
    assert [part.level_bits for part in found.split([2, 4])] == [bits] * 2
    assert found.moved(lambda tensor: tensor.clone()).level_bits == bits
