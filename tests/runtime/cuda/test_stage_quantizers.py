"""Quantizers in training: kernels against `training.act_ste` in torch, whose soft form autograd differentiates."""

import pytest
import torch
from torch import Tensor

from lbllm_cli.act_calib.search import _errors, grid
from lbllm_cli.format.activations import Tables, join_groups, split_groups, uniform_levels
from lbllm_cli.runtime.cuda.activations import QuantizerTables
from lbllm_cli.runtime.cuda.stage import kernels
from lbllm_cli.runtime.cuda.stage.kernels import TritonKernels, long_rows
from lbllm_cli.runtime.cuda.stage.quantizers import prepared
from lbllm_cli.runtime.torch.quantizer import quantized
from lbllm_cli.training.act_ste import fake_quantize, soft_quantize
from lbllm_cli.training.knees import Shape, tables_of
from lbllm_cli.training.quantizers import TrainableQuantizer

KERNELS = TritonKernels()
SMALL, MIDDLE, LARGE = Shape(5, 6, 2, 2, 3, 3), Shape(3, 4, 4, 4, 5, 6), Shape(3, 4, 4, 4, 13, 17)  # tops 23, 51, 127
CLIP = torch.tensor([[0.9, 0.8], [1.0, 0.7]])
TABLES = {
    "one table": tables_of([SMALL])._replace(clip=CLIP[:1]),
    "two tables": tables_of([LARGE, MIDDLE])._replace(clip=CLIP),
    "nothing below zero": Tables(torch.tensor([[0, 1, 2, 3, 4, 7, 10, 16]]).byte(), torch.tensor([0]).byte(), torch.ones(1, 2)),
    "knee of 8 bits": tables_of([Shape(100, 155, 0, 0, 1, 1)]),
    "uniform of 3 bits": Tables(uniform_levels(3), None, CLIP[:1]),
    "uniform of 8 bits": Tables(uniform_levels(8), None, CLIP[1:]),
}
# Of inputs, values that share a step, types of values and steps: ragged groups, a step of all, heads.
CASES = [
    ((5, 200), 64, torch.float32, torch.float32),
    ((2, 3, 72), 72, torch.float16, torch.float32),
    ((2, 2, 5, 32), 32, torch.bfloat16, torch.bfloat16),
]


def on(device: torch.device, tables: Tables) -> Tables:
    return Tables(tables.levels.to(device), None if tables.zero is None else tables.zero.to(device), tables.clip.to(device))


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Heavy tails, some of one sign alone, and zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])) ** 3
    x.view(-1)[:32] = 0
    x[..., :40] = x[..., :40].abs()
    return x.to(dtype)


def joined(groups: Tensor, like: Tensor) -> Tensor:
    return join_groups(groups, like.shape[-1]).to(like.dtype)


def compare(found: Tensor, expected: Tensor, limit: float) -> None:
    """Up to `limit` of the largest value; of 16 bits the last one as well."""
    assert found.dtype == expected.dtype
    rounding = 0 if expected.dtype == torch.float32 else torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found.cpu(), expected, rtol=rounding, atol=limit * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("rows", "width", "expected"),
    [(1, 64, 1), (512, 576, 1), (80_000, 28_672, 2), (7, 2**30, 7), (4, 2**30, 4), (6, 2**30 - 2**15, 3), (6, 2**30 - 64, 6)],
)
def test_places_in_a_long_row_have_32_bits(rows, width, expected):
    """19 sequences of 4,096 tokens with 28,672 inputs are more than 2^31 values: beyond these a place would be negative."""
    assert long_rows(rows, width) == expected
    assert rows * width // expected < 2**31 - 4096


def test_a_large_input_is_cut_into_such_rows(monkeypatch):
    """Without its values, of which there are too many."""
    seen = []
    monkeypatch.setattr(kernels, "quantize_values", lambda rows, *_: seen.append(tuple(rows.shape)))
    x = torch.empty(20, 4000, 28_672, device="meta")
    assert KERNELS.fake_quantize(x, TABLES["two tables"], 128, torch.float32).shape == x.shape
    assert seen == [(2, 40_000 * 28_672)]


def test_an_input_without_tokens_has_no_values(device):
    tables = on(device, TABLES["two tables"])
    assert KERNELS.fake_quantize(torch.empty(2, 0, 64, device=device), tables, 32, torch.float32).shape == (2, 0, 64)


@pytest.mark.parametrize("form", TABLES)
def test_tables_are_made_ready_as_elsewhere(device, form):
    tables = on(device, TABLES[form])
    found, expected = prepared(tables), QuantizerTables.of(tables)
    assert (found.count, found.places) == (expected.count, expected.places)
    assert torch.equal(found.lattice, expected.lattice)
    assert torch.equal(found.factors[:, : 4 if found.count else 2], expected.factors[:, : 4 if found.count else 2])


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize(("shape", "size", "dtype", "step_dtype"), CASES)
def test_values_and_gradients_are_those_of_the_estimator(device, form, shape, size, dtype, step_dtype):
    tables = TABLES[form]
    x, clip = inputs(shape, dtype).requires_grad_(), tables.clip.clone().requires_grad_()
    expected = joined(fake_quantize(split_groups(x, size), clip, tables, step_dtype), x)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected.backward(gradient)
    given, settings = x.detach().to(device), (on(device, tables), size, step_dtype)
    compare(KERNELS.fake_quantize(given, *settings), expected.detach(), 1e-6)  # measured 1.5e-7
    passed, sums = KERNELS.fake_quantize_gradients(given, *settings, gradient.to(device), (True, True))
    assert torch.equal(passed.cpu(), x.grad)
    compare(sums, clip.grad, 1e-4)  # measured 7.3e-6
    assert (x.grad == 0).any() or tables.levels.shape[1] == 256


def test_only_wanted_gradients_are_found(device):
    x, tables = inputs((5, 200)).to(device), on(device, TABLES["two tables"])
    both = KERNELS.fake_quantize_gradients(x, tables, 64, torch.float32, x, (True, True))
    for wanted in ((True, False), (False, True), (False, False)):
        found = KERNELS.fake_quantize_gradients(x, tables, 64, torch.float32, x, wanted)
        assert [part is not None for part in found] == list(wanted)
        assert all(part is None or torch.equal(part, whole) for part, whole in zip(found, both, strict=True))


def soft_case(form: str, shape: tuple[int, ...], size: int, dtype: torch.dtype, tau: float):
    """Inputs, parameters, and the soft form's values in torch, ready to be differentiated."""
    shapes = {"one table": [SMALL], "two tables": [LARGE, MIDDLE], "no coarse levels": [Shape(4, 11, 0, 0, 1, 1), SMALL]}[form]
    tables = tables_of(shapes)._replace(clip=CLIP[: len(shapes)])
    counts = torch.tensor([one[:4] for one in shapes]).float()
    ratio = torch.tensor([one[4:] for one in shapes]) * torch.tensor([1.0, 1.13])
    x = inputs(shape, dtype).requires_grad_()
    parameters = ratio.requires_grad_(), tables.clip.clone().requires_grad_()
    groups = split_groups(x, size)
    values = soft_quantize(groups.float(), quantized(groups.detach(), tables).table, counts, *parameters, tau)
    return x, tables, counts, parameters, joined(values, x)


@pytest.mark.parametrize("form", ["one table", "two tables", "no coarse levels"])
@pytest.mark.parametrize(
    ("shape", "size", "tau", "dtype"),
    [((5, 200), 64, 0.5, torch.float32), ((2, 3, 72), 72, 2.0, torch.bfloat16), ((2, 2, 5, 32), 32, 0.02, torch.float32)],
)
def test_soft_values_and_gradients_are_those_of_autograd(device, form, shape, size, tau, dtype):
    x, tables, counts, (ratio, clip), expected = soft_case(form, shape, size, dtype, tau)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected.backward(gradient)
    parameters = (counts.to(device), ratio.detach().to(device), clip.detach().to(device), tau)
    given = (x.detach().to(device), on(device, tables), size, torch.float32, *parameters)
    compare(KERNELS.soft_quantize(*given), expected.detach(), 1e-6)  # measured 5.6e-8
    passed, of_ratio, of_clip = KERNELS.soft_quantize_gradients(*given, gradient.to(device))
    compare(passed, x.grad, 3e-6)  # measured 3.6e-7
    compare(of_ratio, ratio.grad, 1e-4)  # measured 1.6e-5
    compare(of_clip, clip.grad, 1e-5)  # measured 1.5e-6


def test_soft_gradients_where_torch_halves_them(device):
    """Values on the levels themselves, and on the knees: minima of two that are equal."""
    x = torch.tensor([[-11.0, -8, -5, -4, -1, 0, 0, 1, 2, 5, 6, 9, 12, 6.5, 7.5, -6.5]])
    tables, counts = tables_of([SMALL]), torch.tensor([SMALL[:4]]).float()
    ratio, clip = torch.tensor([[3.0, 3.0]]), torch.ones(1, 2)
    parts = [part.clone().requires_grad_() for part in (x, ratio, clip)]
    soft_quantize(parts[0], torch.zeros(1, dtype=torch.long), counts, *parts[1:], 0.7).sum().backward()
    given = (on(device, tables), 16, torch.float32, counts.to(device), ratio.to(device), clip.to(device), 0.7)
    found = KERNELS.soft_quantize_gradients(x.to(device), *given, torch.ones_like(x).to(device))
    for mine, part in zip(found, parts, strict=True):
        torch.testing.assert_close(mine.cpu(), part.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shapes",
    [
        [SMALL, LARGE],
        [Shape(0, 3, 2, 2, 2, 5)],
        [Shape(3, 4, 0, 0, 1, 1)],
        [Shape(100, 100, 20, 35, 1, 1)],
        [Shape(0, 7, 4, 4, 9, 2)],
    ],
)
def test_deployed_tables_have_rounded_ratios_that_fit(device, shapes):
    counts = torch.tensor([shape[:4] for shape in shapes]).float()
    for factor in (0.4, 1.26, 40.0):
        ratio = torch.tensor([shape[4:] for shape in shapes]) * torch.tensor([factor, 2.5 - factor / 40])
        if shapes[0][2] == 20:
            ratio.clamp_(max=1.4)  # all of 8 bits: they fit with ratios of 1 alone
        expected = tables_of([TrainableQuantizer._rounded(shape, row) for shape, row in zip(shapes, ratio.tolist(), strict=True)])
        levels, zero = KERNELS.deployed_tables(counts.to(device), ratio.to(device), expected.levels.shape[1])
        assert torch.equal(levels.cpu(), expected.levels)
        assert torch.equal(zero.cpu(), expected.zero)


def test_errors_of_tables_are_those_of_the_search(device):
    shapes = [*list(grid(4))[::40], SMALL, LARGE]
    tables = tables_of(shapes)
    for x in (inputs((9, 64)), inputs((3, 200))):
        found = KERNELS.table_errors(x.to(device), tables.levels.to(device), tables.zero.to(device))
        # Measured 2.4e-7, relative.
        torch.testing.assert_close(found.cpu(), _errors(x, shapes), rtol=1e-5, atol=1e-9)
