"""Straight-through activation quantizers: the forward pass of the format, gradients of the declared surrogates."""

import pytest
import torch

from lbllm_cli.format.activations import Tables, quantize, snap_table, uniform_levels
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.training.act_ste import fake_quantize, soft_quantize
from lbllm_cli.training.knees import Shape, tables_of

ONE = Shape(4, 5, 3, 3, 3, 3)
TWO = Shape(7, 6, 1, 1, 14, 17)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()


def uniform(bits: int = 4, clip: tuple[float, float] = (1.0, 1.0)) -> Tables:
    return Tables(uniform_levels(bits), None, torch.tensor([clip]))


@pytest.mark.parametrize("tables", [tables_of([ONE, TWO]), uniform()], ids=["knee", "uniform"])
def test_fake_quantization_is_the_quantizer_bit_for_bit(tables):
    x = draw(3, 5, 64)
    for clip in (tables.clip, tables.clip * 0.8):
        clipped = tables._replace(clip=clip)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(fake_quantize(x, clip, clipped, dtype), backend_of(x.device).quantized(x, clipped, dtype).values)


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
