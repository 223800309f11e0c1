"""Products with many rows of activations against decoded weights in float64."""

import pytest
import torch
from packed_weights import filled_up, moved, off, quantized_rows, random_weights, sharing_rows

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


@pytest.mark.parametrize(
    ("inn", "size", "step"), [(200, 16, 64), (96, 32, 64), (72, 16, 48), (700, 16, 256), (300, 128, 256), (96, 48, 48)]
)
def test_groups_that_share_a_step(device, inn, size, step):
    """Levels of 2 bits, whose groups are smaller than those of inputs."""
    linears, places, steps, x = sharing_rows(9, inn, size, step)
    out = torch.full((9, 7), torch.nan, device=device)
    gemm_quantized(CudaWeights.of(moved(linears, device)), places.to(device), steps.to(device), step // size, out)
    assert off(out, x, linears, None) < TOLERANCE  # measured 4.0e-8


@pytest.mark.parametrize(
    ("inn", "size", "step"),
    [(200, 16, 64), (600, 32, 128), (700, 16, 256), (1100, 32, 512), (200, 16, 32), (220, 32, 32), (300, 32, 64)],
)
def test_folded_groups(device, inn, size, step):
    linears, places, steps, x = sharing_rows(9, inn, size, step)
    weights = CudaWeights.of(moved(linears, device), fold=True)
    out = torch.full((9, 7), torch.nan, device=device)
    places = filled_up(places, weights.padded_width)
    gemm_quantized(weights, places.to(device), steps.to(device), step // size, out)
    assert off(out, x, linears, None) < TOLERANCE  # measured 2.7e-8


@pytest.mark.parametrize(
    ("inn", "size", "fold"),
    [(200, 16, False), (330, 32, False), (300, 128, False), (130, 48, False), (9, 16, False), (200, 16, True), (330, 32, True)],
)
def test_levels_of_two_bits_with_one_step_and_with_values(device, inn, size, fold):
    """All of a row is one unit: slices go across groups, the last one past its end."""
    linears = random_weights(inn, (5, 2), size, bits=2)
    weights = CudaWeights.of(moved(linears, device), fold)
    places, steps, x = quantized_rows(3, inn, size, "token")
    places = filled_up(places, weights.padded_width)
    out = torch.full((3, 7), torch.nan, device=device)
    gemm_quantized(weights, places.to(device), steps.to(device), 0, out)
    assert off(out, x, linears, None) < TOLERANCE  # measured 4.2e-8
    x = torch.randn(3, inn, generator=torch.Generator().manual_seed(1))
    out = torch.full((3, 7), torch.nan, device=device)
    gemm(weights, x.to(device), out)
    assert off(out, x.double(), linears, None) < TOLERANCE  # measured 6.1e-8


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
