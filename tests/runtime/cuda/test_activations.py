"""The activation quantizer's kernels against `format.activations`."""

import pytest
import torch
import triton
import triton.language as tl

from lbllm_cli.format.activations import Tables, dequantize, places, quantize, split_groups, uniform_levels
from lbllm_cli.runtime.cuda.activations import QuantizerTables, quantize_activations, quantize_groups, quantize_values
from lbllm_cli.training.knees import Shape, tables_of

SMALL, MIDDLE, LARGE = Shape(5, 6, 2, 2, 3, 3), Shape(3, 4, 4, 4, 5, 6), Shape(3, 4, 4, 4, 13, 17)  # tops 23, 51, 127
FORMS = {
    "one table": tables_of([SMALL]),
    "two tables": tables_of([LARGE, MIDDLE]),
    "clipped": tables_of([MIDDLE, SMALL])._replace(clip=torch.tensor([[0.9, 0.8], [1.0, 0.7]])),
    "nothing below zero": Tables(torch.tensor([[0, 1, 2, 3, 4, 7, 10, 16]]).byte(), torch.tensor([0]).byte(), torch.ones(1, 2)),
    "uniform of 4 bits": Tables(uniform_levels(4), None, torch.ones(1, 2)),
    "uniform of 7 bits": Tables(uniform_levels(7), None, torch.tensor([[0.95, 0.9]])),
}
WIDE = {
    "uniform of 8 bits": Tables(uniform_levels(8), None, torch.ones(1, 2)),
    "knee of 8 bits": Tables(torch.arange(256).byte().view(1, 256), torch.tensor([100]).byte(), torch.tensor([[1.0, 0.9]])),
}
# width, values that share a step
SHAPES = [(200, 64), (96, 32), (300, 128), (200, 256), (33, 33)]


def on(device: torch.device, tables: Tables) -> Tables:
    return Tables(tables.levels.to(device), None if tables.zero is None else tables.zero.to(device), tables.clip.to(device))


def inputs(rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Heavy tails, and a group of zeros."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) ** 3
    x[0, :32] = 0
    return x.to(dtype)


def wanted(x: torch.Tensor, tables: Tables, size: int, step_dtype: torch.dtype = torch.float32):
    """T - Z [rows, width rounded up to groups], steps [rows, groups] and values [rows, width] of the definition."""
    width = x.shape[1]
    codes = quantize(split_groups(x, min(size, width)), tables, step_dtype)
    lattice = places(codes, tables.levels).int() - codes.zero.int().unsqueeze(-1)
    return lattice.flatten(1), codes.step, dequantize(codes, tables.levels).flatten(1)[:, :width].to(x.dtype)


def compare(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Steps differ by the order of a sum: measured 1.9e-7 at most."""
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_places_and_steps_are_the_formats(device, form):
    tables = FORMS[form]
    prepared = QuantizerTables.of(on(device, tables))
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)
    for (width, size), dtype in zip(SHAPES, types, strict=True):
        x = inputs(2, width, dtype)
        lattice, steps, _ = wanted(x, tables, size)
        padded = -(-width // 64) * 64 if size >= width else lattice.shape[1]
        found = torch.full((2, padded), 99, dtype=torch.int8, device=device)
        step = torch.full(steps.shape, torch.nan, device=device)
        quantize_activations(x.to(device), prepared, size, found, step)
        assert torch.equal(found[:, :width].cpu().int(), lattice[:, :width])
        assert not found[:, width:].any()
        compare(step, steps)


@pytest.mark.parametrize("form", [*FORMS, *WIDE])
def test_values_are_the_formats(device, form):
    tables = (FORMS | WIDE)[form]
    prepared = QuantizerTables.of(on(device, tables))
    for width, size, dtype, step_dtype in ((200, 64, torch.bfloat16, torch.float32), (96, 96, torch.float32, torch.bfloat16)):
        x = inputs(3, width, dtype)
        expected = wanted(x, tables, size, step_dtype)[2]
        found = torch.empty_like(x, device=device)
        quantize_values(x.to(device), prepared, size, found, step_dtype)
        # A step that differs in its last bit may fall to the other side of a rounding to 8 bits: none did.
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=0)


def test_a_lattice_place_goes_where_the_format_sends_it(device):
    for tables in (FORMS["two tables"], FORMS["nothing below zero"], WIDE["knee of 8 bits"]):
        prepared = QuantizerTables.of(on(device, tables))
        for lattice, levels, zero in zip(prepared.lattice.cpu(), tables.levels, tables.zero, strict=True):
            # Steps of 1, values on the lattice: each place is looked up once, and the group reaches the ends of its table.
            place = torch.arange(int(levels[-1]) + 1)
            nearest = (levels.int() - place.unsqueeze(1)).abs()
            lower = levels.int()[nearest.argmin(1)]  # the first of two that are equally near
            assert torch.equal(lattice[: len(place)].int(), lower - int(zero))


def test_eight_bits_are_refused_where_they_do_not_fit(device):
    prepared = QuantizerTables.of(on(device, WIDE["uniform of 8 bits"]))
    x = torch.zeros(1, 64, device=device)
    with pytest.raises(ValueError, match="256 codes do not fit"):
        quantize_activations(x, prepared, 64, x.to(torch.int8), x[:, :1].contiguous())


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(device, broken):
    x = inputs(1, 64)
    x[0, 40] = broken
    for tables in (FORMS["two tables"], FORMS["uniform of 4 bits"]):
        found = torch.zeros_like(x, device=device)
        quantize_values(x.to(device), QuantizerTables.of(on(device, tables)), 32, found)
        assert not found[:, 32:].isfinite().any()
        assert found[:, :32].isfinite().all()


@triton.jit
def _half(x, lattice, factors, values, TABLES: tl.constexpr, PLACES: tl.constexpr):
    at = tl.arange(0, 2)[:, None] * 32 + tl.arange(0, 32)[None, :]
    found, step = quantize_groups(tl.load(x + at) * 0.5, lattice, factors, TABLES, PLACES, tl.float32)
    tl.store(values + at, found * step[:, None])


def test_other_kernels_quantize_what_they_hold(device):
    tables, x = FORMS["clipped"], inputs(2, 32)
    prepared, found = QuantizerTables.of(on(device, tables)), torch.empty(2, 32, device=device)
    _half[(1,)](x.to(device), prepared.lattice, prepared.factors, found, TABLES=prepared.count, PLACES=prepared.places)
    compare(found, wanted(x * 0.5, tables, 32)[2])
