"""The search for knees and tables that quantizers start from."""

import itertools

import pytest
import torch

from lbllm_cli.act_calib.search import Sample, fit_knees, grid
from lbllm_cli.format.activations import dequantize, quantize
from lbllm_cli.format.names import LATTICE_MAX
from lbllm_cli.training.knees import Shape, tables_of


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()


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
    shapes = fit_knees([Sample(x, bits, 2)])[0]
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
    ((found,),) = fit_knees([Sample(x, 3, 1)])
    assert error(found) <= 1.01 * least  # measured 1.000


def test_two_tables_are_better_than_one():
    x = torch.cat([draw(256, 64), torch.randn(256, 64, generator=torch.Generator().manual_seed(4))])
    errors = []
    for count in (1, 2):
        tables = tables_of(fit_knees([Sample(x, 4, count)])[0])
        errors.append(float((dequantize(quantize(x, tables), tables.levels) - x).square().sum()))
    assert errors[1] < 0.9 * errors[0]  # measured 0.869
