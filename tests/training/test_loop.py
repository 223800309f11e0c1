"""The training loop: rates of the steps."""

import pytest

from lbllm_cli.training.loop import rate_factor


def test_rate_factor_rises_and_falls():
    factors = [rate_factor(step, 100, 0.05) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] == pytest.approx(0.05)
    assert rate_factor(0, 1, 0.0) == 1.0
