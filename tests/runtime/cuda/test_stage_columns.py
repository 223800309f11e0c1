"""Columns of a group and its levels: kernels against what `ptq` computes in torch."""

import pytest
import torch
from torch import Tensor

from lbllm_cli.format.levels import project_levels
from lbllm_cli.ptq import em, row_levels
from lbllm_cli.ptq.compensate import _columns
from lbllm_cli.ptq.moments import damped
from lbllm_cli.ptq.refine import _descend
from lbllm_cli.runtime.cuda.stage.kernels import TritonKernels

KERNELS = TritonKernels()
# size of the group, rows
SHAPES = [(32, 19), (17, 5), (144, 3)]


def problem(size: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A group's columns [size, rows], a Hessian and its factor, both parts of larger ones, and levels of every second group."""
    random = torch.Generator().manual_seed(size)
    x = torch.randn(3 * size, size + 16, generator=random) * torch.rand(size + 16, generator=random)
    hessian = damped(x.T @ x, 0.01)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    levels = torch.randn(rows, 2, 4, generator=random).sort(-1).values[:, 1]
    part = slice(8, 8 + size)
    return torch.randn(size, rows, generator=random), hessian[part, part], factor[part, part], levels


def compare(ranks: Tensor, found: Tensor, expected_ranks: Tensor, expected: Tensor) -> None:
    """Rows with the same ranks have the same values; a weight between two levels to the last bit may fall to either side, and the
    columns behind it follow. Interpreted, none does.
    """
    same = (ranks.cpu() == expected_ranks).all(0)
    assert same.float().mean() > 0.8
    # Measured 1.4e-7 of the largest.
    limit = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(found.cpu()[:, same], expected[:, same], rtol=0, atol=limit)


@pytest.mark.parametrize("push", [True, False])
@pytest.mark.parametrize(("size", "rows"), SHAPES)
def test_compensated_columns_are_those_of_torch(device, size, rows, push):
    block, _, factor, levels = problem(size, rows)
    ranks, errors = _columns(block, factor, levels, push)
    given = block.clone()
    found, wrong = KERNELS.compensate_columns(given.to(device), factor.to(device), levels.to(device), push)
    assert torch.equal(given, block)
    compare(found, wrong, ranks, errors)


@pytest.mark.parametrize(("size", "rows"), SHAPES)
def test_columns_descend_as_in_torch(device, size, rows):
    gradient, hessian, _, levels = problem(size, rows)
    gradient *= hessian.diagonal().mean()
    ranks = torch.randint(0, 4, (size, rows), generator=torch.Generator().manual_seed(rows)).to(torch.uint8)
    current = levels.T.gather(0, ranks.long())
    chosen, found = ranks.clone(), ranks.clone().to(device)
    expected = _descend(gradient.clone(), current, hessian, levels, chosen)
    moved = KERNELS.descend_columns(gradient.to(device), current.to(device), hessian.to(device), levels.to(device), found)
    compare(found, moved, chosen, expected)
    assert (chosen != ranks).any()


@pytest.mark.parametrize(("size", "rows"), [(16, 19), (32, 5), (17, 33), (128, 3)])
def test_levels_descend_as_in_torch(device, size, rows):
    gradient, hessian, _, _ = problem(size, rows)
    gradient *= hessian.diagonal().mean() / 4
    random = torch.Generator().manual_seed(rows)
    scale = (torch.rand(rows, 1, generator=random) * 0.01 + 0.005).half()
    levels, _ = project_levels(torch.randn(rows, 2, 4, generator=random).sort(-1).values, 2, scale)
    ranks = torch.randint(0, 4, (size, rows), generator=random).to(torch.uint8)
    ranks[:, 0] = 3  # levels of no weight
    wanted, whole = levels.clone(), levels.clone().to(device)
    expected = row_levels._descend(gradient.clone(), hessian, wanted[:, 1], scale.squeeze(1), ranks)
    shared = scale.to(device).expand(rows, 2)
    given = gradient.clone().to(device)
    moved = KERNELS.descend_levels(given, hessian.to(device), whole[:, 1], shared[:, 1], ranks.to(device))
    assert torch.equal(given.cpu(), gradient)
    assert torch.equal(whole[:, 0].cpu(), levels[:, 0])
    assert not torch.equal(wanted, levels)
    same = (whole.cpu() == wanted).all(-1).all(-1)
    # Of two values as near to the last bit either may be taken. Interpreted, none of 60 rows differs.
    assert same.float().mean() > 0.9
    torch.testing.assert_close(moved.cpu()[:, same], expected[:, same], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("rows", "n"),
    [pytest.param(9, 128, marks=pytest.mark.slow), (3, 20), pytest.param(33, 32, marks=pytest.mark.slow), (2, 1), (1, 300)],
)
def test_levels_are_those_of_torch(device, rows, n):
    random = torch.Generator().manual_seed(n)
    weight = torch.randn(rows, n, generator=random)
    weight[1:2] = 0.5  # one value: three levels without members
    importance = torch.rand(n, generator=random) ** 8 + 1e-9
    importance[n // 2] = 1e6
    for given in (importance, importance.expand(rows, n).clone() * torch.rand(rows, n, generator=random)):
        expected = em.fit_levels(weight, given, 7)
        found = KERNELS.fit_levels(weight.to(device), given.to(device), 7, None).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # measured 2.2e-7
        scale = (torch.rand(rows, generator=random) * 0.02 + 0.01).half()
        wanted = em.fit_levels(weight, given, 7, scale)
        stored = KERNELS.fit_levels(weight.to(device), given.to(device), 7, scale.to(device)).cpu()
        torch.testing.assert_close(stored, wanted, rtol=0, atol=0)
        assert not torch.equal(wanted, expected)
    assert n == 1 or not torch.equal(expected, em.quantile_levels(weight))
