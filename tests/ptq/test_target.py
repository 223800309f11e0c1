"""The asymmetric target against explicit inputs: a grid search over lengths, a ridge regression by least squares."""

import pytest
import torch

from lbllm_cli.ptq.moments import InputMoments, inverse_factor
from lbllm_cli.ptq.target import parabola, step_length, target_step

OUT, IN, TOKENS = 5, 9, 40


def _case(seed):
    """Weight [OUT, IN], step [OUT, IN], inputs of both streams [TOKENS, IN]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, IN, generator=g) @ torch.randn(IN, IN, generator=g)
    y = x + 0.5 * torch.randn(TOKENS, IN, generator=g)
    return torch.randn(OUT, IN, generator=g), 0.3 * torch.randn(OUT, IN, generator=g), x, y


def _moments(x, y):
    found = InputMoments.empty(IN, torch.device("cpu"), True)
    found.add(x, y)
    return found


def _error(weight, step, x, y, length):
    """|W Y - (W + length * step) X|^2 in float64."""
    w, s = weight.double(), step.double()
    return float((y.double() @ w.T - x.double() @ (w + length * s).T).square().sum())


def _searched(weight, step, x, y):
    """The best of 2001 lengths in [0, 1]."""
    lengths = torch.linspace(0, 1, 2001, dtype=torch.float64).view(-1, 1, 1)
    missing = y.double() @ weight.double().T - x.double() @ weight.double().T
    errors = (missing - lengths * (x.double() @ step.double().T)).square().sum((1, 2))
    return float(lengths[errors.argmin()])


def test_step_length_against_grid_search():
    inside = 0
    for seed in range(12):
        weight, noise, x, y = _case(seed)
        # A useful direction, too long, plus noise: the minimum is inside [0, 1].
        moments = _moments(x, y)
        _, factor, _ = inverse_factor(moments.mean_hessian(), 0.01)
        step = 1.5 * target_step(weight, moments.mean_drift(), factor) + (seed % 3) * 0.5 * noise
        found = step_length(parabola(weight, step, moments))
        # Measured: 2.1e-4; half a cell of the grid is 2.5e-4.
        assert found == pytest.approx(_searched(weight, step, x, y), abs=3e-4)
        inside += 0 < found < 1
    assert inside == 12


def test_step_length_is_exact_where_the_answer_is_known():
    # Y = (1 + a) X makes W Y = (W + a W) X: along step = W the minimum is a.
    weight, _, x, _ = _case(0)
    for a in (0.0, 0.25, 0.8, 1.0):
        # Measured: 7e-8.
        assert step_length(parabola(weight, weight, _moments(x, (1 + a) * x))) == pytest.approx(a, abs=5e-6)


def test_step_length_stays_between_zero_and_one():
    weight, _, x, _ = _case(1)
    moments = _moments(x, 1.5 * x)
    assert step_length(parabola(weight, 0.1 * weight, moments)) == 1.0
    assert step_length(parabola(weight, -weight, moments)) == 0.0


def test_step_length_without_curvature():
    weight, step, x, y = _case(2)
    assert step_length(parabola(weight, torch.zeros_like(step), _moments(x, y))) == 0.0
    assert step_length(parabola(weight, step, _moments(torch.zeros_like(x), torch.zeros_like(y)))) == 0.0


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_target_step_is_a_ridge_regression(damping):
    for seed in range(4):
        weight, _, x, y = _case(seed)
        moments = _moments(x, y)
        _, factor, used = inverse_factor(moments.mean_hessian(), damping)
        found = target_step(weight, moments.mean_drift(), factor)
        # min over D of |W (Y - X) - D X|^2 / TOKENS + ridge |D|^2, stacked into one least-squares problem.
        ridge = used * x.double().square().sum(0).mean() / TOKENS
        rows = torch.cat([x.double() / TOKENS**0.5, ridge.sqrt() * torch.eye(IN, dtype=torch.float64)])
        wanted = (y - x).double() @ weight.double().T / TOKENS**0.5
        solved = torch.linalg.lstsq(rows, torch.cat([wanted, torch.zeros(IN, OUT, dtype=torch.float64)])).solution.T
        # Measured: 5.7e-6 of the largest entry.
        torch.testing.assert_close(found.double(), solved, atol=5e-5 * float(solved.abs().max()), rtol=0)
        assert _error(weight, found, x, y, 1.0) < _error(weight, found, x, y, 0.0)


def test_no_drift_no_step():
    weight, _, x, _ = _case(3)
    moments = _moments(x, x)
    _, factor, _ = inverse_factor(moments.mean_hessian(), 0.01)
    step = target_step(weight, moments.mean_drift(), factor)
    assert not step.any()
    assert step_length(parabola(weight, step, moments)) == 0.0
