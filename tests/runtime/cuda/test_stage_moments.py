"""Sums of products of stage 1: kernels against float64."""

import pytest
import torch
from torch import Tensor

from lbllm_cli.format.weights import group_count
from lbllm_cli.ptq.refine import _equations
from lbllm_cli.runtime.cuda.stage.kernels import TritonKernels
from lbllm_cli.runtime.cuda.stage.moments import SIDE
from lbllm_cli.runtime.cuda.stage.normal import ROWS

KERNELS = TritonKernels()


def symmetric(width: int) -> Tensor:
    """A Hessian [width, width] with a few massive inputs."""
    x = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(width))
    x[:, ::29] *= 300
    products = x.T @ x
    return (products + products.T) / 2


# The last group of columns is worked on in two pieces.
SHAPES = [(3, 200, 64), (ROWS + 1, 96, 32), (2, 128, 128), (2, 100, 48), (1, 300, 160)]


@pytest.mark.parametrize(("rows", "width", "size"), SHAPES)
def test_normal_equations_are_those_of_torch(device, rows, width, size):
    random = torch.Generator().manual_seed(width)
    ranks = torch.randint(0, 4, (rows, width), generator=random).to(torch.uint8)
    ranks[0] %= 2  # two levels that no weight uses
    hessian, weighted = symmetric(width), torch.randn(rows, width, generator=random)
    unknowns = 4 * group_count(width, size)
    gram, right = KERNELS.normal_equations(ranks.to(device), weighted.to(device), hessian.to(device), size)
    assert gram.shape == (rows, unknowns, unknowns)
    assert right.shape == (rows, unknowns)
    exact, exact_right = _equations(ranks, weighted.double(), hessian.double(), size)(slice(None))
    blocks = torch.arange(unknowns) // 4
    below = blocks.unsqueeze(1) >= blocks
    error = (gram.cpu() - exact)[:, below].abs().max() / exact[:, below].abs().max()
    assert error < 1e-6  # measured 1.4e-7
    # Measured 7.4e-7, of sums up to 35.
    torch.testing.assert_close(right.cpu(), exact_right.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(70, 200), (33, 24)])
def test_moments_are_those_of_torch(device, tokens, width, dtype):
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=random)
    x[:, 5] *= 100
    x, y = x.to(dtype), (x + 0.1 * torch.randn(tokens, width, generator=random)).to(dtype)
    before, started = symmetric(width), torch.randn(width, width, generator=random)
    hessian, drift = before.clone().to(device), started.clone().to(device)
    KERNELS.add_products(x.to(device), y.to(device), hessian, drift)
    x, apart = x.double(), y.double() - x.double()
    assert torch.equal(hessian[SIDE:, :SIDE], hessian[:SIDE, SIDE:].T)
    wrong = (hessian.cpu() - before - x.T @ x).abs() / (before.abs() + x.T.abs() @ x.abs())
    assert wrong.max() < 1e-6  # measured 1.6e-7
    # The difference is rounded to the dtype of x.
    wrong = (drift.cpu() - started - apart.T @ x).abs() / (started.abs() + apart.T.abs() @ x.abs())
    assert wrong.max() < torch.finfo(dtype).eps / 2  # measured 0.15 eps


def test_moments_without_the_other_stream(device):
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    hessian = torch.zeros(40, 40, device=device)
    KERNELS.add_products(x.to(device), None, hessian, None)
    KERNELS.add_products(x.to(device), None, hessian, None)
    torch.testing.assert_close(hessian.cpu(), 2 * x.float().T @ x.float(), rtol=1e-6, atol=1e-6)
