"""Weights in training: kernels against the straight-through estimators and the optimizer of torch."""

import pytest
import torch
from torch import Tensor

from lbllm_cli.format.levels import level_values, stored_grid
from lbllm_cli.format.weights import grouped, pack_codes
from lbllm_cli.runtime.cuda.stage.kernels import TritonKernels
from lbllm_cli.training.ste import fixed_level, nearest_level, stored_levels

KERNELS = TritonKernels()
# out, in, group size
SHAPES = [(3, 200, 64), (17, 96, 32), (5, 128, 128), (2, 100, 48)]
TYPES = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def masters(out: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """Latents [out, groups, size], not a number where there is no weight, and levels [out, groups, 4]."""
    random = torch.Generator().manual_seed(width)
    latent = grouped(torch.randn(out, width, generator=random), size)
    latent.flatten(1)[:, width:] = torch.nan
    return latent, torch.randn(*latent.shape[:2], 4, generator=random).sort(-1).values


@pytest.mark.parametrize("bits", [8, 4])
def test_levels_are_stored_as_the_format_has_them(device, bits):
    random = torch.Generator().manual_seed(1)
    levels = torch.randn(300, 4, generator=random) * torch.logspace(-9, 8, 300).unsqueeze(1)  # down to subnormal scales, and 0
    levels[::7] = level_values(*stored_grid(levels[::7], bits))  # on the grid already
    levels[5, 1], levels[6] = torch.nan, torch.inf
    found = KERNELS.stored_levels(levels.view(3, 100, 4).to(device), bits).view(300, 4).cpu()
    expected = level_values(*stored_grid(levels, bits))
    good = expected.isfinite().all(1)
    assert torch.equal(found[good], expected[good])
    assert not found[~good].isfinite().any()
    assert 250 < good.sum() < 299
    assert (expected == 0).all(1).any()
    assert torch.equal(stored_levels(levels[50:60], bits, None, True), found[50:60])


@pytest.mark.parametrize("ascending", [True, False])
def test_levels_of_two_bits_are_those_of_the_table(device, ascending):
    random = torch.Generator().manual_seed(2)
    scale = (torch.rand(30, 1, generator=random) * 0.01 + 1e-3).half()
    signs = torch.tensor([-1.0, -1, 1, 1] if ascending else [-1.0, 1, -1, 1])
    levels = torch.rand(30, 20, 4, generator=random) * signs
    levels[3] = level_values(*stored_grid(levels[3:4], 2, scale[3:4], ascending))[0]  # on the table already
    # Half-widths that are as near as two others: the first.
    levels[4, 1] = scale[4].float() * torch.tensor([-38.0, -13, 11, 44] if ascending else [-13.0, 11, -38, 44])
    levels[5, 2, 1], levels[6, 3] = torch.nan, torch.inf
    found = KERNELS.table_levels(levels.to(device), scale.to(device), ascending).cpu()
    expected = level_values(*stored_grid(levels, 2, scale, ascending))
    good = expected.isfinite().all(-1)
    assert good.sum() == 598
    assert torch.equal(found[good], expected[good])
    assert not found[~good].isfinite().all(-1).any()
    scale[0] = 0  # a row of zeros: its levels are of the table as well
    stored = KERNELS.table_levels(levels.to(device), scale.to(device), ascending, torch.int8).cpu()
    assert torch.equal(stored[good], stored_grid(levels, 2, scale, ascending)[0][good])
    assert torch.equal(stored_levels(levels[7:9], 2, scale[7:9], ascending), found[7:9])


@pytest.mark.parametrize(("out", "width", "size"), SHAPES)
def test_a_latent_takes_its_nearest_level(device, out, width, size):
    latent, levels = masters(out, width, size)
    latent[0, 0, :3] = (levels[0, 0, 1:] + levels[0, 0, :-1]) / 2  # halfway: the lower one
    expected = nearest_level(latent.nan_to_num(), levels).flatten(1)[:, :width]
    for dtype in TYPES:
        weight = torch.full((out, width), torch.nan, dtype=dtype, device=device)
        KERNELS.nearest(latent.to(device), levels.to(device), weight)
        assert torch.equal(weight.cpu(), expected.to(dtype))


@pytest.mark.parametrize(("out", "width", "size"), SHAPES)
def test_gradients_of_levels_and_their_norm(device, out, width, size):
    latent, levels = masters(out, width, size)
    for dtype in TYPES:
        gradient = torch.randn(out, width, generator=torch.Generator().manual_seed(2)).to(dtype)
        known = levels.clone().requires_grad_()
        nearest_level(latent.nan_to_num(), known).flatten(1)[:, :width].backward(gradient.float())
        sums, square = KERNELS.nearest_sums(gradient.to(device), latent.to(device), levels.to(device))
        # Sums in another order: measured 9.5e-7 at most, of values up to 15.
        torch.testing.assert_close(sums.cpu(), known.grad, rtol=0, atol=5e-6)
        torch.testing.assert_close(square.cpu(), gradient.float().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("out", "width", "size"), SHAPES)
def test_a_step_is_adamw_and_a_pull(device, out, width, size):
    latent, levels = masters(out, width, size)
    dampening, rates = 0.05, (0.01, 0.003)
    mine = latent.clone().to(device)
    moments = tuple(torch.zeros_like(mine) for _ in range(2))
    reference = torch.nn.Parameter(latent.nan_to_num())
    optimizer = torch.optim.AdamW([reference], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for number, rate in enumerate(rates, start=1):
        gradient = torch.randn(out, width, generator=torch.Generator().manual_seed(number)).bfloat16()
        values = nearest_level(reference.detach(), levels)
        reference.grad = grouped(gradient.float() * 0.7, size)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        reference.data.lerp_(values, dampening)
        step, factor, skipped = (torch.tensor(value, device=device) for value in (float(number), 0.7, 0.0))
        KERNELS.latent_step(mine, moments, step, gradient.to(device), levels.to(device), factor, skipped, rate, dampening)
        found, expected = mine.cpu().flatten(1), reference.detach().flatten(1)
        # Measured 2.4e-7 at most of the latents, 3e-8 of the moments.
        torch.testing.assert_close(found[:, :width], expected[:, :width], rtol=0, atol=1e-6)
        assert found[:, width:].isnan().all()
        for part, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
            state = optimizer.state[reference][name]
            torch.testing.assert_close(part.cpu(), state, rtol=1e-6, atol=1e-7)
    assert (found[:, :width] - latent.flatten(1)[:, :width]).abs().median() > 0.01


def test_a_skipped_step_changes_nothing(device):
    latent, levels = masters(3, 200, 64)
    mine, gradient = latent.clone().to(device), torch.full((3, 200), torch.nan, device=device)
    moments = tuple(torch.ones_like(mine) for _ in range(2))
    one, zero = torch.ones((), device=device), torch.zeros((), device=device)
    KERNELS.latent_step(mine, moments, zero, gradient, levels.to(device), one, one, 0.01, 0.5)
    torch.testing.assert_close(mine.cpu(), latent, rtol=0, atol=0, equal_nan=True)
    assert all(bool((part == 1).all()) for part in moments)


@pytest.mark.parametrize(("out", "width", "size"), SHAPES)
def test_packed_codes_and_gradients_of_their_levels(device, out, width, size):
    random = torch.Generator().manual_seed(size)
    codes = torch.randint(0, 4, (out, width), generator=random).to(torch.uint8)
    packed, levels = pack_codes(codes, size).to(device), torch.randn(out, -(-width // size), 4, generator=random)
    for dtype in TYPES:
        known = levels.clone().requires_grad_()
        expected = fixed_level(grouped(codes, size), known).flatten(1)[:, :width]
        weight = torch.full((out, width), torch.nan, dtype=dtype, device=device)
        KERNELS.decoded(packed, levels.to(device), weight)
        assert torch.equal(weight.cpu(), expected.detach().to(dtype))
        gradient = torch.randn(out, width, generator=random).to(dtype)
        expected.backward(gradient.float())
        # Measured 1.9e-6 at most.
        torch.testing.assert_close(KERNELS.code_sums(gradient.to(device), packed).cpu(), known.grad, rtol=0, atol=5e-6)
