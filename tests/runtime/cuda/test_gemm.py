"""Products with many rows of activations against decoded weights in float64."""

import pytest
import torch
from packed_weights import TABLE_SHAPES, moved, off, quantized_rows, random_weights, step_error, value_error

from lbllm_cli.runtime.cuda.gemm import gemm, gemm_quantized, tile
from lbllm_cli.runtime.cuda.weights import CudaWeights

TOLERANCE = 4e-7
# in_features, out_features of each linear, group_size, rows
SHAPES = [(200, (40, 30), 64, 9), (96, (6,), 32, 1), (300, (4, 1, 2), 128, 37), (130, (3,), 48, 2), (80, (5,), 16, 9),
          (300, (3,), 160, 3), (70, (9,), 64, 65)]  # fmt: skip


@pytest.mark.parametrize("per", ["group", "token"])
def test_quantized_rows_times_weights(device, per):
    worst = 0.0
    for number, (inn, outs, size, rows) in enumerate(SHAPES):
        linears = random_weights(inn, outs, size, seed=number)
        weights = CudaWeights.of(moved(linears, device))
        places, step, x = quantized_rows(rows, inn, size, per, seed=number)
        bias = torch.randn(sum(outs)) if number % 2 else None
        out = torch.full((rows, sum(outs)), torch.nan, device=device)
        on = None if bias is None else bias.to(device)
        gemm_quantized(weights, places.to(device), step.to(device), int(per == "group"), out, bias=on)
        worst = max(worst, off(out, x, linears, bias))
    assert worst < TOLERANCE  # measured 6.7e-8


@pytest.mark.parametrize(("inn", "size", "step", "fold"), TABLE_SHAPES)
def test_levels_of_two_bits(device, inn, size, step, fold):
    """Groups that are smaller than those of inputs; with one step slices go across all groups, the last one past its end."""
    assert step_error(gemm_quantized, device, 9, inn, size, step, fold) < TOLERANCE  # measured 3.6e-8
    if not step:
        assert value_error(gemm, device, 3, inn, size, fold) < TOLERANCE  # measured 6.1e-8


def test_values_times_weights_in_full(device):
    worst = 0.0
    for number, (inn, outs, size, rows) in enumerate(SHAPES):
        linears = random_weights(inn, outs, size, seed=number)
        weights = CudaWeights.of(moved(linears, device))
        x = torch.randn(rows, inn, generator=torch.Generator().manual_seed(number))
        bias = torch.randn(sum(outs)) if number % 2 else None
        out = torch.full((rows, sum(outs)), torch.nan, device=device)
        gemm(weights, x.to(device), out, bias=None if bias is None else bias.to(device))
        worst = max(worst, off(out, x.double(), linears, bias))
    assert worst < TOLERANCE  # measured 1.1e-7


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_of_16_bits_meet_weights_of_16_bits(device, dtype, bits):
    linears = random_weights(200, (5, 3), 64, bits=bits)
    weights = CudaWeights.of(moved(linears, device))
    x = torch.randn(3, 200).to(dtype)
    dense = torch.cat([linear.values() for linear in linears]).to(dtype)
    out = torch.empty(3, 8, device=device)
    gemm(weights, x.to(device), out)
    terms = x.double().abs() @ dense.double().abs().T
    error = ((out.cpu().double() - x.double() @ dense.double().T).abs() / terms).max()
    assert error < TOLERANCE  # measured 4.6e-8


def test_a_residual_is_added_before_anything_is_rounded(device):
    (linear,) = random_weights(64, (6,), 32)
    weights, places, step, x = CudaWeights.of(moved([linear], device)), *quantized_rows(2, 64, 32, "group")
    residual = torch.randn(2, 6).bfloat16()
    wanted = (x @ linear.values().double().T + residual.double()).bfloat16()
    out = residual.clone().to(device)
    gemm_quantized(weights, places.to(device), step.to(device), 1, out, residual=out)
    assert torch.equal(out.cpu(), wanted)
    out = residual.clone().to(device)
    gemm(weights, x.float().to(device), out, residual=out)
    assert torch.equal(out.cpu(), wanted)


def test_tiles():
    shapes = (700, 8), (9, 1), (33, 10), (33, 1, 4), (33, 1, 0)
    found = [tuple(tile(*shape)[key] for key in ("W", "V", "UNIT", "SLICE", "ROWS", "OUTS")) for shape in shapes]
    ways = [(8, 8, 8, 8, 64, 128), (1, 1, 1, 2, 16, 64), (10, 2, 10, 8, 64, 128), (1, 1, 4, 4, 64, 128), (1, 1, 0, 8, 64, 128)]
    assert found == ways


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_tile_of_values_fits_the_smallest_shared_memory(itemsize):
    """Of RTX cards, 101,376 bytes; compiled, three stages of float32 took 102,912 and two 67,840."""
    found = tile(2048, 8, values=True, itemsize=itemsize)
    stages = found["num_stages"] * found["ROWS"] * found["SLICE"] * 16 * itemsize
    assert stages + 5000 < 101_376
