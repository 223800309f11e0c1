"""Input moments and the factor of the inverse Hessian, against float64."""

import pytest
import torch

from lbllm_cli.ptq.moments import CHOLESKY_RETRIES, InputMoments, damped, inverse_factor

CPU = torch.device("cpu")


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _inputs(tokens, inn, seed):
    """Correlated inputs, float32 [tokens, inn]."""
    g = _generator(seed)
    return torch.randn(tokens, inn, generator=g) @ (torch.randn(inn, inn, generator=g) * 0.3 + torch.eye(inn))


def _moments(pairs, with_drift=True):
    found = InputMoments.empty(pairs[0][0].shape[-1], CPU, with_drift)
    for x, y in pairs:
        found.add(x, y)
    return found


def test_moments_against_float64():
    x, y = _inputs(60, 12, 0), _inputs(60, 12, 1)
    found = _moments([(x[:20].view(4, 5, 12), y[:20].view(4, 5, 12)), (x[20:], y[20:])])
    assert found.tokens == 60
    # Measured: 1.8e-7 of the largest entry at most.
    hessian = x.double().T @ x.double() / 60
    torch.testing.assert_close(found.mean_hessian().double(), hessian, atol=3e-6 * float(hessian.abs().max()), rtol=0)
    drift = (y - x).double().T @ x.double() / 60
    torch.testing.assert_close(found.mean_drift().double(), drift, atol=3e-6 * float(drift.abs().max()), rtol=0)


def test_moments_against_loop():
    x, y = torch.tensor([[1.0, 2], [3, -1], [0, 5]]), torch.tensor([[2.0, 2], [1, 0], [0, 4]])
    found = _moments([(x, y)])
    hessian, drift = [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        for i in range(2):
            for j in range(2):
                hessian[i][j] += a[i] * a[j]
                drift[i][j] += (b[i] - a[i]) * a[j]
    assert found.hessian.tolist() == hessian
    assert found.drift.tolist() == drift


def test_plus_is_adding_everything():
    pairs = [(_inputs(30, 8, seed), _inputs(30, 8, seed + 10)) for seed in range(4)]
    everything, parts = _moments(pairs), (_moments(pairs[:1]), _moments(pairs[1:]))
    both = parts[0].plus(parts[1])
    assert both.tokens == everything.tokens == 120
    # Measured: 3.2e-7 of the largest entry; sums in another order.
    torch.testing.assert_close(both.hessian, everything.hessian, atol=2e-6 * float(both.hessian.abs().max()), rtol=0)
    torch.testing.assert_close(both.drift, everything.drift, atol=2e-6 * float(both.drift.abs().max()), rtol=0)
    assert parts[0].tokens == 30
    assert not torch.equal(parts[0].hessian, both.hessian)


def test_moments_without_drift():
    x = _inputs(10, 4, 0)
    found = _moments([(x, None)], with_drift=False)
    assert found.drift is None
    assert found.plus(_moments([(x, x)])).drift is None
    with pytest.raises(ValueError, match="drift"):
        found.mean_drift()
    assert torch.equal(found.mean_hessian(), _moments([(x, x)]).mean_hessian())


def test_moments_sum_16_bit_inputs_in_float32():
    x = _inputs(40, 6, 2).bfloat16()
    y = _inputs(40, 6, 3).bfloat16()
    found, wide = _moments([(x, y)]), _moments([(x.float(), y.float())])
    assert found.hessian.dtype == torch.float32
    assert torch.equal(found.hessian, wide.hessian)
    assert torch.equal(found.drift, wide.drift)


def test_no_tokens():
    found = InputMoments.empty(3, CPU, True)
    assert torch.equal(found.mean_hessian(), torch.zeros(3, 3))
    assert torch.equal(found.mean_drift(), torch.zeros(3, 3))


@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("tokens", [5, 400])
def test_inverse_factor(damping, tokens):
    x = _inputs(tokens, 24, 4)
    hessian = x.T @ x / tokens
    before = hessian.clone()
    h, upper, used = inverse_factor(hessian, damping)
    assert used == damping
    wanted = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(h.double(), wanted, atol=1e-6 * float(wanted.abs().max()), rtol=0)
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    inverse = torch.linalg.inv(wanted)
    # Measured: 9.9e-6 of the largest entry at most.
    product = upper.double().T @ upper.double()
    torch.testing.assert_close(product, inverse, atol=5e-5 * float(inverse.abs().max()), rtol=0)
    assert torch.equal(hessian, before)


def test_diagonal_of_the_factor_is_the_remaining_inverse():
    # 1 / U_jj^2 is what a column costs once earlier columns are fixed: 1 / (H[j:, j:]^-1)[0, 0].
    x = _inputs(100, 10, 5)
    h, upper, _ = inverse_factor(x.T @ x / 100, 0.05)
    slow = [1 / float(torch.linalg.inv(h[j:, j:].double())[0, 0]) for j in range(10)]
    # Measured: 6.3e-7.
    assert (1 / upper.diagonal().double().square()).tolist() == pytest.approx(slow, rel=1e-5)


def test_damping_grows_until_it_works():
    # Smallest eigenvalue -0.05, mean diagonal 0.75: 0.01 gives 0.0075, 0.1 gives 0.075.
    hessian = torch.diag(torch.tensor([1.0, 1.05, 1.0, -0.05]))
    h, upper, used = inverse_factor(hessian, 0.01)
    assert used == pytest.approx(0.1)
    assert torch.equal(h, damped(hessian, used))
    # Measured: 1.2e-7.
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(h), atol=5e-6, rtol=0)


def test_singular_needs_more_damping():
    # Rank one: damping below float32's resolution leaves it singular.
    row = torch.linspace(1, 2, 32)
    _, upper, used = inverse_factor(torch.outer(row, row), 1e-10)
    assert used > 5e-10
    assert bool(torch.isfinite(upper).all())


def test_no_damping_helps():
    hessian = torch.tensor([[1.0, 1e4], [1e4, 1.0]])
    with pytest.raises(FloatingPointError, match=f"{0.01 * 10**CHOLESKY_RETRIES:g}"):
        inverse_factor(hessian, 0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad):
    hessian = torch.eye(4)
    hessian[2, 1] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        inverse_factor(hessian, 0.01)


def test_all_zero_hessian_is_the_identity():
    h, upper, used = inverse_factor(torch.zeros(5, 5), 0.01)
    assert torch.equal(h, torch.eye(5))
    assert torch.equal(upper, torch.eye(5))
    assert used == 0.01


def test_dead_inputs_stand_alone():
    x = _inputs(200, 8, 6)
    x[:, [2, 5]] = 0
    hessian = x.T @ x / 200
    h, upper, _ = inverse_factor(hessian, 0.01)
    ridge = 0.01 * float(hessian.diagonal().mean())
    for j in (2, 5):
        others = [k for k in range(8) if k != j]
        assert float(h[j, j]) == pytest.approx(ridge, rel=1e-6)
        assert not upper[j, others].any()
        assert not upper[others, j].any()
        assert float(upper[j, j]) ** -2 == pytest.approx(ridge, rel=1e-5)
