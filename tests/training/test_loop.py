"""The training loop: rates of the steps."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lbllm_cli.training.loop import rate_factor
from lbllm_cli.training.update import Update


def test_rate_factor_rises_and_falls():
    factors = [rate_factor(step, 100, 0.05) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] == pytest.approx(0.05)
    assert rate_factor(0, 1, 0.0) == 1.0


def test_units_of_many_sets_of_parameters_are_not_kept_for_ever():
    """Of experts every step moves others: each set would leave a tensor on the device."""
    nothing: Any = SimpleNamespace(groups=list)
    update = Update(nothing, nothing, torch.device("cpu"))
    for step in range(40):
        units = tuple(float(step + part) for part in range(3))
        assert update._on_device(units).tolist() == list(units)
    assert len(update._units) <= 8
