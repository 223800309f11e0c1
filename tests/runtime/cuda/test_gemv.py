"""Products with few rows of activations against decoded weights in float64, and the layout of weights."""

import pytest
import torch
from packed_weights import TABLE_SHAPES, moved, off, quantized_rows, random_weights, step_error, value_error

import lbllm_cli.runtime.cuda.gemv as module
from lbllm_cli.format.level_table import unpack_places
from lbllm_cli.format.weights import PackedWeight, pack_codes
from lbllm_cli.runtime.cuda.gemv import gemv, gemv_quantized, tile
from lbllm_cli.runtime.cuda.weights import CudaWeights, words_of

TOLERANCE = 2e-7
# in_features, out_features of each linear, group_size: ragged ends, groups of 1, 3 and 4 words of a span
SHAPES = [(200, (5, 3), 64), (96, (6,), 32), (300, (4, 1, 2), 128), (130, (3,), 48), (80, (5,), 16), (600, (3,), 512)]


@pytest.fixture
def large(monkeypatch):
    """Programs take as many rows of weights as they do of a large model's linears."""
    monkeypatch.setattr(module, "_PROGRAMS", 1)


@pytest.mark.parametrize("level_bits", [8, 4, 2])
@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 96, 128, 160, 256, 4096])
def test_packing_is_undone_bit_for_bit(group_size, level_bits):
    linears = random_weights(200, (5, 1, 3), group_size, bits=level_bits)
    weights = CudaWeights.of(linears)
    levels = torch.uint8 if level_bits == 2 else torch.int32
    assert [part.dtype for part in (weights.words, weights.levels, weights.scale)] == [torch.int32, levels, torch.float16]
    bits = 8 * sum(part.nbytes for part in (weights.words, weights.levels, weights.scale))
    of_row, of_group = (16, 8) if level_bits == 2 else (0, 48)
    assert bits == 9 * (weights.groups * (2 * group_size + of_group) + of_row)
    assert weights.padded_width == weights.groups * group_size
    for slot, linear in enumerate(linears):
        assert weights.packed(slot).level_bits == level_bits
        for found, expected in zip(weights.packed(slot).tensors, linear.tensors, strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


@pytest.mark.parametrize(("group_size", "width"), [(16, 200), (16, 256), (32, 200)])
def test_folding_is_undone_bit_for_bit(group_size, width):
    linears = random_weights(width, (5, 1, 3), group_size, bits=2)
    weights = CudaWeights.of(linears, fold=True)
    units = -(-width // (4 * group_size))
    assert weights.words.shape == (9, units, group_size // 4)
    assert weights.levels.shape == (9, 4 * units)
    assert weights.padded_width == 4 * group_size * units
    for slot, linear in enumerate(linears):
        for found, expected in zip(weights.packed(slot).tensors, linear.tensors, strict=True):
            assert torch.equal(found, expected)


def test_a_code_lies_where_the_layout_says():
    """One code of 3 among zeros: column 16 * V * m + 4 * V * s + 4 * v + i is selector s of word V * m + v, nibble i."""
    for group_size, width in ((128, 8), (32, 2), (48, 1), (192, 4)):
        for column in range(0, group_size, 7):
            codes = torch.zeros(1, 1, group_size // 4, dtype=torch.uint8)
            codes[0, 0, column // 4] = 3 << (2 * (column % 4))
            block, within = divmod(column, 16 * width)
            selector, within = divmod(within, 4 * width)
            word, i = divmod(within, 4)
            bit = (0, 2, 16, 18)[selector] + 4 * i
            found = words_of(codes)[0, 0].tolist()
            assert found[width * block + word] & 0xFFFFFFFF == 3 << bit
            assert sum(map(bool, found)) == 1


@pytest.mark.parametrize("per", ["group", "token"])
def test_quantized_rows_times_weights(device, large, per):
    worst = 0.0
    for number, ((inn, outs, size), rows) in enumerate(zip(SHAPES, (1, 2, 3, 5, 8, 1), strict=True)):
        linears = random_weights(inn, outs, size, seed=number)
        weights = CudaWeights.of(moved(linears, device))
        places, step, x = quantized_rows(rows, inn, size, per, seed=number)
        bias = torch.randn(sum(outs)) if number % 2 else None
        out = torch.full((rows, sum(outs)), torch.nan, device=device)
        on = None if bias is None else bias.to(device)
        gemv_quantized(weights, places.to(device), step.to(device), int(per == "group"), out, bias=on)
        worst = max(worst, off(out, x, linears, bias))
    assert worst < TOLERANCE  # measured 3.7e-8


@pytest.mark.parametrize(("inn", "size", "step", "fold"), TABLE_SHAPES)
def test_levels_of_two_bits(device, large, inn, size, step, fold):
    """Groups that are smaller than those of inputs."""
    assert step_error(gemv_quantized, device, 2, inn, size, step, fold) < TOLERANCE  # measured 5.0e-8
    if not step:
        assert value_error(gemv, device, 2, inn, size, fold) < TOLERANCE  # measured 9.1e-8


@pytest.mark.slow
def test_every_byte_of_levels(device, large):
    """All 256 of them, by products with inputs that pick one code's level each."""
    packed = torch.arange(256, dtype=torch.uint8).view(256, 1, 1)
    codes = torch.arange(4, dtype=torch.uint8).repeat(256, 4)
    linear = PackedWeight(pack_codes(codes, 16), unpack_places(packed), torch.ones(256, 1).half(), 16, 2)
    weights, out = CudaWeights.of(moved([linear], device)), torch.empty(4, 256, device=device)
    gemv(weights, torch.eye(16)[:4].to(device), out)
    assert torch.equal(out.cpu().T, unpack_places(packed)[:, 0].float())


def test_values_times_weights(device, large):
    worst = 0.0
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16, torch.float32)
    for number, ((inn, outs, size), rows, dtype) in enumerate(zip(SHAPES, (3, 1, 2, 1, 4, 2), types, strict=True)):
        linears = random_weights(inn, outs, size, seed=number)
        weights = CudaWeights.of(moved(linears, device))
        x = torch.randn(rows, inn, generator=torch.Generator().manual_seed(number)).to(dtype)
        bias = torch.randn(sum(outs)) if number % 2 else None
        out = torch.full((rows, sum(outs)), torch.nan, device=device)
        gemv(weights, x.to(device), out, bias=None if bias is None else bias.to(device))
        worst = max(worst, off(out, x.double(), linears, bias))
    assert worst < TOLERANCE  # measured 3.9e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_residual_is_added_before_anything_is_rounded(device, large, dtype):
    (linear,) = random_weights(64, (6,), 32)
    weights, places, step, x = CudaWeights.of(moved([linear], device)), *quantized_rows(2, 64, 32, "group")
    residual = torch.randn(2, 6).to(dtype)
    wanted = (x @ linear.values().double().T + residual.double()).to(dtype)
    out = residual.clone().to(device)
    gemv_quantized(weights, places.to(device), step.to(device), 1, out, residual=out)
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-6, atol=1e-4)  # outputs reach 2,000
    out = residual.clone().to(device)
    gemv(weights, x.float().to(device), out, residual=out)
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-6, atol=1e-4)  # outputs reach 2,000


@pytest.mark.parametrize("rows", [1, 2])
def test_more_groups_than_are_read_at_once(device, rows):
    linears = random_weights(9600, (1,), 16)
    weights = CudaWeights.of(moved(linears, device))
    assert tile(rows, *weights.words.shape)["GROUPS"] < weights.groups
    places, step, x = quantized_rows(rows, 9600, 16, "group")
    out = torch.empty(rows, 1, device=device)
    gemv_quantized(weights, places.to(device), step.to(device), 1, out)
    assert off(out, x, linears, None) < TOLERANCE
    gemv(weights, x.float().to(device), out)
    assert off(out, x.float().double(), linears, None) < TOLERANCE


def test_a_tile_covers_a_layer_of_seven_billion():
    shapes = (1, 4096, 32, 8), (8, 4096, 86, 8), (1, 960, 5, 8), (3, 5000, 1, 256)
    keys = ("ROWS", "OUTS", "GROUPS", "WORDS", "num_warps")
    found = [tuple(tile(*shape)[key] for key in keys) for shape in shapes]
    assert found == [(1, 4, 32, 8, 2), (8, 2, 32, 8, 2), (1, 1, 8, 8, 1), (4, 4, 1, 256, 2)]
