"""Levels of 2 bits in stage 1: the scale of a row and the levels behind it, against loops and brute force in float64."""

from itertools import product

import pytest
import torch

from lbllm_cli.format.levels import project_levels
from lbllm_cli.format.names import TABLE_LEVELS
from lbllm_cli.ptq import row_levels
from lbllm_cli.ptq.compensate import RankFit
from lbllm_cli.ptq.em import fit_levels
from lbllm_cli.ptq.refine import values_of
from lbllm_cli.ptq.row_levels import descend_levels, fit_row_scale, refit_scale

SHAPES = [(5, 48, 16), (6, 40, 16), (4, 100, 32)]
BY_RANK = [tuple(row[code] for code in (2, 0, 1, 3)) for row in TABLE_LEVELS]


def _case(out, inn, size, seed):
    """Weight, damped H of correlated inputs, and a fit with random codes and levels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * inn, inn, generator=g) @ (torch.eye(inn) + 0.4 * torch.randn(inn, inn, generator=g))
    hessian = x.T @ x / (3 * inn)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(inn)
    weight, groups = torch.randn(out, inn, generator=g), -(-inn // size)
    scale = (torch.rand(out, 1, generator=g) * 0.01 + 0.02).half()
    levels, scales = project_levels(torch.randn(out, groups, 4, generator=g).sort(-1).values, 2, scale)
    ranks = torch.randint(0, 4, (out, inn), generator=g, dtype=torch.uint8)
    return weight, hessian, RankFit(ranks, levels, scales, 2)


def _row_errors(weight, fit, hessian, size):
    delta = weight.double() - values_of(fit, size).double()
    return ((delta @ hessian.double()) * delta).sum(1)


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_a_scale_is_least_squares(out, inn, size):
    weight, hessian, fit = _case(out, inn, size, 1)
    found = refit_scale(weight, hessian, fit, size)
    assert torch.equal(found.levels, fit.levels)
    root = torch.linalg.cholesky(hessian.double()).T
    whole = values_of(fit._replace(scale=torch.ones_like(fit.scale)), size).double()
    for row in range(out):
        wanted = torch.linalg.lstsq((root @ whole[row])[:, None], (root @ weight[row].double())[:, None]).solution
        if float(wanted) > 0:
            # Rounded to float16, 4.9e-4 at most. Measured: 4.7e-4.
            assert torch.allclose(found.scale[row].double(), wanted.squeeze(), rtol=5e-4, atol=0)
        else:
            assert torch.equal(found.scale[row], fit.scale[row])


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_descending_never_raises_the_error_and_stays_in_the_table(out, inn, size):
    weight, hessian, fit = _case(out, inn, size, 2)
    start = refit_scale(weight, hessian, fit, size)
    before = _row_errors(weight, start, hessian, size)
    found = descend_levels(weight, hessian, fit, size)
    after = _row_errors(weight, found, hessian, size)
    assert torch.equal(found.ranks, fit.ranks)
    assert torch.equal(found.scale, start.scale)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.8 * float(before.sum())  # measured 0.42 to 0.61
    assert set(map(tuple, found.levels.flatten(0, 1).tolist())) <= set(BY_RANK)
    assert bool((found.levels.short().diff(dim=-1) > 0).all())


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_each_group_has_the_best_levels_when_it_is_its_turn(out, inn, size):
    """One pass in a loop, every entry of the table tried under the whole H."""
    weight, hessian, fit = _case(out, inn, size, 3)
    slow = refit_scale(weight, hessian, fit, size)
    levels = slow.levels.clone()
    for row, group in product(range(out), range(levels.shape[1])):
        errors = []
        for entry in BY_RANK:
            levels[row, group] = torch.tensor(entry)
            errors.append(float(_row_errors(weight, slow._replace(levels=levels), hessian, size)[row]))
        levels[row, group] = torch.tensor(BY_RANK[errors.index(min(errors))])
    found = descend_levels(weight, hessian, fit, size)
    # Measured: 0. Two entries may be equally good in float32.
    assert float((found.levels != levels).float().mean()) < 0.01


def test_levels_that_no_weight_has_leave_the_choice_to_the_others():
    weight, hessian, fit = _case(5, 48, 16, 4)
    ranks = fit.ranks.clone()
    ranks[ranks == 3] = 2
    found = descend_levels(weight, hessian, fit._replace(ranks=ranks), 16)
    before = refit_scale(weight, hessian, fit._replace(ranks=ranks), 16)
    assert bool((_row_errors(weight, found, hessian, 16) < _row_errors(weight, before, hessian, 16)).all())


def test_the_scale_of_a_row_against_a_loop():
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(7, 40, generator=g) * torch.rand(7, 1, generator=g)
    importance = torch.rand(40, generator=g) + 0.01
    found = fit_row_scale(weight, importance, 16, lambda group, costs: fit_levels(group, costs, 20))
    least = importance.min() * 1e-6
    for row in range(7):
        rms, errors, scales = float(weight[row].double().square().mean().sqrt()), [], []
        for reach in row_levels._REACHES:
            scale = torch.tensor(rms * reach / 127).half()
            total = 0.0
            for start in range(0, 40, 16):
                own, costs = weight[row, start : start + 16], importance[start : start + 16]
                padded = torch.zeros(16), torch.full((16,), float(least))
                padded[0][: len(own)], padded[1][: len(own)] = own, costs
                levels = fit_levels(padded[0][None], padded[1], 20)
                stored, _ = project_levels(levels[:, None], 2, scale.view(1, 1))
                values = (stored[0, 0].double() * scale.double()).tolist()
                total += sum(c * min((float(w) - v) ** 2 for v in values) for w, c in zip(own, costs.tolist(), strict=True))
            errors.append(total)
            scales.append(float(scale))
        chosen = scales.index(min(scales, key=lambda s, row=row: abs(s - float(found[row]))))
        assert float(found[row]) == pytest.approx(scales[chosen], rel=1e-3)
        assert errors[chosen] <= min(errors) * (1 + 1e-4)  # measured 0: the same scale
