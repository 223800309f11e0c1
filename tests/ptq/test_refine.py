"""Refitting levels and descending over codes, against dense least squares, loops and brute force in float64."""

from itertools import product

import pytest
import torch

from lbllm_cli.format.levels import level_values, project_levels
from lbllm_cli.format.weights import ordered
from lbllm_cli.ptq import refine
from lbllm_cli.ptq.compensate import RankFit
from lbllm_cli.ptq.refine import descend_codes, output_errors, refit_levels, relative_error, values_of

SHAPES = [(5, 48, 16), (6, 40, 16), (4, 20, 8), (3, 12, 16)]


def _case(out, inn, size, seed, random_codes=False):
    """Weight, damped H of correlated inputs, and a fit: quantile levels with the nearest or with random codes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * inn, inn, generator=g) @ (torch.eye(inn) + 0.4 * torch.randn(inn, inn, generator=g))
    hessian = x.T @ x / (3 * inn)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(inn)
    weight = torch.randn(out, inn, generator=g)
    ranks, levels, scales = torch.zeros(out, inn, dtype=torch.uint8), [], []
    for start in range(0, inn, size):
        block = weight[:, start : start + size]
        at = torch.tensor([0.125, 0.375, 0.625, 0.875])
        stored, scale = project_levels(block.quantile(at, dim=1).T.contiguous())
        values = level_values(stored, scale)
        ranks[:, start : start + size] = (block.unsqueeze(2) - values.unsqueeze(1)).abs().argmin(2).to(torch.uint8)
        levels.append(stored)
        scales.append(scale)
    if random_codes:
        ranks = torch.randint(0, 4, (out, inn), generator=g, dtype=torch.uint8)
    return weight, hessian, RankFit(ranks, torch.stack(levels, 1), torch.stack(scales, 1))


def _slow_values(fit, size):
    values = fit.values().tolist()
    return [[values[r][c // size][k] for c, k in enumerate(row)] for r, row in enumerate(fit.ranks.tolist())]


def _row_errors(weight, quantized, hessian):
    """Squared output error of each row, float64."""
    delta = weight.double() - quantized.double()
    return ((delta @ hessian.double()) * delta).sum(1)


def _dense_refit(weight, hessian, ranks, size):
    """Each row's best weights for fixed codes: least squares over a dense 0/1 matrix, float64."""
    root = torch.linalg.cholesky(hessian.double()).T
    rows = []
    for w, codes in zip(weight.double(), ranks.tolist(), strict=True):
        used = sorted({(c // size, k) for c, k in enumerate(codes)})
        choice = torch.zeros(len(codes), len(used), dtype=torch.float64)
        for c, k in enumerate(codes):
            choice[c, used.index((c // size, k))] = 1
        rows.append(choice @ torch.linalg.lstsq(root @ choice, (root @ w).unsqueeze(1)).solution[:, 0])
    return torch.stack(rows)


def _slow_descent(weight, hessian, fit, size):
    """Every column in turn: each of the four levels tried, the one with the least full error kept."""
    hessian = hessian.double()
    values = fit.values().double()
    ranks = fit.ranks.clone()
    current = torch.tensor(_slow_values(fit, size), dtype=torch.float64)
    for c in range(weight.shape[1]):
        tried = []
        for k in range(4):
            trial = current.clone()
            trial[:, c] = values[:, c // size, k]
            tried.append(_row_errors(weight, trial, hessian))
        best = torch.stack(tried, 1).argmin(1)
        ranks[:, c] = best.to(torch.uint8)
        current[:, c] = values[:, c // size].gather(1, best.unsqueeze(1))[:, 0]
    return ranks


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_values_against_loop(out, inn, size):
    _, _, fit = _case(out, inn, size, 0, random_codes=True)
    assert values_of(fit, size).tolist() == _slow_values(fit, size)


def test_output_error_against_inputs():
    g = torch.Generator().manual_seed(1)
    x, weight, other = (torch.randn(n, 6, generator=g) for n in (30, 4, 4))
    wanted = float((x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum())
    # Measured: no difference.
    assert relative_error(output_errors(weight, other, x.T @ x)) == pytest.approx(wanted, rel=1e-5)
    assert relative_error(output_errors(weight, weight, x.T @ x)) == 0.0
    assert relative_error(output_errors(weight * 0, weight * 0, x.T @ x)) == 0.0


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_ordered_keeps_the_weights(out, inn, size):
    g = torch.Generator().manual_seed(2)
    groups = -(-inn // size)
    ranks = torch.randint(0, 4, (out, inn), generator=g, dtype=torch.uint8)
    levels = torch.randn(out, groups, 4, generator=g)
    renamed, ascending = ordered(ranks, levels, size)
    assert renamed.dtype == torch.uint8
    assert bool((ascending[..., 1:] >= ascending[..., :-1]).all())
    for r in range(out):
        for c in range(inn):
            assert ascending[r, c // size, int(renamed[r, c])] == levels[r, c // size, int(ranks[r, c])]


def _float_levels(monkeypatch):
    """Catches the levels before they are put on the grid."""
    caught = []

    def project(levels, bits):
        caught.append(levels.clone())
        return project_levels(levels, bits)

    monkeypatch.setattr(refine, "project_levels", project)
    return caught


@pytest.mark.parametrize("random_codes", [False, True])
@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_refit_against_dense_least_squares(monkeypatch, out, inn, size, random_codes):
    weight, hessian, fit = _case(out, inn, size, 3, random_codes)
    caught = _float_levels(monkeypatch)
    found = refit_levels(weight, hessian, fit, size)
    wanted = _dense_refit(weight, hessian, fit.ranks, size)
    index = (torch.arange(inn) // size).expand(out, inn)
    at = torch.arange(out).unsqueeze(1)
    # Before the grid. Measured: 4.2e-5 at most.
    torch.testing.assert_close(caught[0][at, index, found.ranks.long()].double(), wanted, atol=3e-4, rtol=0)
    # On the grid: half a step of the stored scale.
    error = (values_of(found, size).double() - wanted).abs()
    assert bool((error <= 0.5 * found.scale.double()[at, index] + 3e-4).all())
    assert bool((found.levels[..., 1:] >= found.levels[..., :-1]).all())
    assert [t.dtype for t in found[:3]] == [torch.uint8, torch.int8, torch.float16]


@pytest.mark.parametrize("random_codes", [False, True])
def test_refit_never_raises_the_error_beyond_the_grid(random_codes):
    falls = []
    for seed in range(12):
        weight, hessian, fit = _case(4, 40, 16, seed, random_codes)
        found = refit_levels(weight, hessian, fit, 16)
        before, after = (_row_errors(weight, values_of(f, 16), hessian) for f in (fit, found))
        # At the optimum the error is flat, so rounding by d costs d H d <= largest eigenvalue x |d|^2.
        steps = found.scale.double().repeat_interleave(16, 1)[:, :40] / 2
        room = torch.linalg.eigvalsh(hessian.double())[-1] * steps.square().sum(1)
        assert bool((after <= before + room).all())
        falls.append(float(after.sum() / before.sum()))
    # Measured on average: 0.45, for random codes 0.32.
    assert sum(falls) / len(falls) < (0.45 if random_codes else 0.6)


def test_refit_recovers_the_levels():
    # Weights that are four values a group, coded right but with other levels: the values come back.
    _, hessian, fit = _case(4, 40, 16, 5)
    planted = values_of(fit, 16)
    wrong = RankFit(fit.ranks, *project_levels(fit.values() + torch.tensor([-0.4, 0.1, 0.2, 0.3])))
    found = refit_levels(planted, hessian, wrong, 16)
    # Half a step of the scale, plus the solver's rounding. Measured: 0.11 of a step.
    step = found.scale.float().repeat_interleave(16, 1)[:, :40]
    assert float(((values_of(found, 16) - planted).abs() / step).max()) < 0.51
    assert relative_error(output_errors(planted, values_of(found, 16), hessian)) < 1e-4
    assert relative_error(output_errors(planted, values_of(wrong, 16), hessian)) > 1e-2


def test_refit_leaves_unused_levels(monkeypatch):
    weight, hessian, fit = _case(3, 40, 16, 6)
    ranks = fit.ranks.clamp(max=2)
    caught = _float_levels(monkeypatch)
    refit_levels(weight, hessian, RankFit(ranks, fit.levels, fit.scale), 16)
    kept = fit.values()[..., 3:]
    # Measured: 1.2e-7. Levels are sorted afterwards, so it is looked for anywhere.
    assert float((caught[0] - kept).abs().amin(2).max()) < 1e-5


def test_refit_keeps_rows_that_cannot_be_solved():
    weight, hessian, fit = _case(4, 40, 16, 7)
    good = refit_levels(weight, hessian, fit, 16)
    weight[1, 3] = float("nan")
    found = refit_levels(weight, hessian, fit, 16)
    # Kept, then put on the grid again. Measured: unchanged.
    assert bool(((found.values() - fit.values())[1].abs() <= 0.5 * found.scale[1].float().unsqueeze(1) + 1e-6).all())
    assert torch.equal(found.ranks[1], fit.ranks[1])
    for a, b in zip(found[:3], good[:3], strict=True):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])


def test_refit_in_chunks(monkeypatch):
    weight, hessian, fit = _case(6, 40, 16, 8)
    whole = refit_levels(weight, hessian, fit, 16)
    for chunk_bytes in (1, 4 * 12 * 60 * 4):
        monkeypatch.setattr(refine, "_CHUNK_BYTES", chunk_bytes)
        for a, b in zip(refit_levels(weight, hessian, fit, 16)[:3], whole[:3], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("random_codes", [False, True])
@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_descent_against_loop(out, inn, size, random_codes):
    weight, hessian, fit = _case(out, inn, size, 9, random_codes)
    found = descend_codes(weight, hessian, fit, size)
    assert torch.equal(found.ranks, _slow_descent(weight, hessian, fit, size))
    assert torch.equal(found.levels, fit.levels)
    assert torch.equal(found.scale, fit.scale)


@pytest.mark.parametrize("random_codes", [False, True])
def test_descent_never_raises_the_error(random_codes):
    falls = []
    for seed in range(12):
        weight, hessian, fit = _case(4, 40, 16, seed, random_codes)
        for _ in range(3):
            found = descend_codes(weight, hessian, fit, 16)
            before, after = (_row_errors(weight, values_of(f, 16), hessian) for f in (fit, found))
            # Measured: no rise at all.
            assert bool((after <= before * (1 + 1e-6)).all())
            falls.append(float(after.sum() / before.sum()))
            fit = found
    # First passes, measured on average: 0.52, for random codes 0.14.
    assert sum(falls[::3]) / 12 < (0.2 if random_codes else 0.8)


def test_descent_ends_where_no_single_change_helps():
    weight, hessian, fit = _case(3, 20, 8, 10, random_codes=True)
    for _ in range(20):
        found = descend_codes(weight, hessian, fit, 8)
        if torch.equal(found.ranks, fit.ranks):
            break
        fit = found
    assert torch.equal(found.ranks, fit.ranks)
    current = values_of(fit, 8)
    values = fit.values()
    base = _row_errors(weight, current, hessian)
    for c in range(20):
        for k in range(4):
            trial = current.clone()
            trial[:, c] = values[:, c // 8, k]
            assert bool((_row_errors(weight, trial, hessian) >= base - 1e-6).all())


@pytest.mark.parametrize("size", [5, 4])
def test_descent_against_brute_force(size):
    reached = 0
    for seed in range(20):
        weight, hessian, fit = _case(1, 5, size, seed, random_codes=True)
        # A group of one weight has four equal levels from its quantiles: spread them.
        fit = RankFit(fit.ranks, *project_levels(fit.values() + torch.tensor([-0.3, -0.1, 0.1, 0.3])))
        codes = torch.tensor(list(product(range(4), repeat=5)))
        every = fit.values()[0].double()[torch.arange(5) // size, codes]
        best = float(_row_errors(weight.expand(1024, 5), every, hessian).min())
        start = float(_row_errors(weight, values_of(fit, size), hessian))
        for _ in range(6):
            fit = descend_codes(weight, hessian, fit, size)
        end = float(_row_errors(weight, values_of(fit, size), hessian))
        assert best - 1e-9 <= end <= start * (1 + 1e-9)
        reached += end <= best * (1 + 1e-9)
    # Measured: 10 of 20 reach the optimum.
    assert reached >= 8


def test_inputs_stay():
    weight, hessian, fit = _case(3, 20, 8, 11, random_codes=True)
    kept = [t.clone() for t in (weight, hessian, *fit[:3])]
    refit_levels(weight, hessian, fit, 8)
    descend_codes(weight, hessian, fit, 8)
    for now, before in zip((weight, hessian, *fit[:3]), kept, strict=True):
        assert torch.equal(now, before)
