"""Columns of a group and its levels: kernels against what `ptq` computes in torch."""

import pytest
import torch
from torch import Tensor

from lbllm_cli.ptq import em
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
    return torch.randn(size, rows, generator=random), hessian[8 : 8 + size, 8 : 8 + size], factor[8 : 8 + size, 8 : 8 + size], levels


def moved_apart(found: Tensor, expected: Tensor) -> float:
    """Share of the ranks that differ: of a weight that lies between two levels to the last bit, and of what follows from it."""
    return (found.cpu() != expected).float().mean().item()


@pytest.mark.parametrize("push", [True, False])
@pytest.mark.parametrize(("size", "rows"), SHAPES)
def test_compensated_columns_are_those_of_torch(device, size, rows, push):
    block, _, factor, levels = problem(size, rows)
    ranks, errors = _columns(block, factor, levels, push)
    given = block.clone()
    found, wrong = KERNELS.compensate_columns(given.to(device), factor.to(device), levels.to(device), push)
    print(size, rows, push, moved_apart(found, ranks), (wrong.cpu() - errors).abs().max() / errors.abs().max())
    assert torch.equal(given, block)
    assert moved_apart(found, ranks) == 0
    torch.testing.assert_close(wrong.cpu(), errors, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "rows"), SHAPES)
def test_columns_descend_as_in_torch(device, size, rows):
    gradient, hessian, _, levels = problem(size, rows)
    gradient *= hessian.diagonal().mean()
    ranks = torch.randint(0, 4, (size, rows), generator=torch.Generator().manual_seed(rows)).to(torch.uint8)
    current = levels.T.gather(0, ranks.long())
    chosen, found = ranks.clone(), ranks.to(device)
    expected = _descend(gradient.clone(), current, hessian, levels, chosen)
    moved = KERNELS.descend_columns(gradient.to(device), current.to(device), hessian.to(device), levels.to(device), found)
    print(size, rows, moved_apart(found, chosen), (moved.cpu() - expected).abs().max(), moved_apart(chosen, ranks))
    assert moved_apart(found, chosen) == 0
    torch.testing.assert_close(moved.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "n"), [(9, 128), (3, 20), (33, 32), (2, 1), (1, 300)])
def test_levels_are_those_of_torch(device, rows, n):
    random = torch.Generator().manual_seed(n)
    weight = torch.randn(rows, n, generator=random)
    weight[1:2] = 0.5  # one value: three levels without members
    importance = torch.rand(n, generator=random) ** 8 + 1e-9
    importance[n // 2] = 1e6
    for given in (importance, importance.expand(rows, n).clone() * torch.rand(rows, n, generator=random)):
        expected = em.fit_levels(weight, given, 7)
        found = KERNELS.fit_levels(weight.to(device), given.to(device), 7).cpu()
        print(rows, n, ((found - expected) / expected).abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert n == 1 or not torch.equal(expected, em.quantile_levels(weight))
