"""Four levels by weighted EM: against a slow Lloyd iteration and against brute force over all partitions."""

from itertools import combinations, pairwise

import pytest
import torch

from lbllm_cli.format.levels import level_values, project_levels
from lbllm_cli.format.names import TABLE_LEVELS
from lbllm_cli.ptq.em import fit_levels, nearest_rank, quantile_levels


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _rank(value, levels):
    """The nearest level, the lower one on a tie."""
    best = 0
    for k in range(1, 4):
        if abs(value - levels[k]) < abs(value - levels[best]):
            best = k
    return best


def _slow_starts(weight):
    """Equal parts of the range, levels of a normal distribution, and quantiles with a level for one end."""
    ordered, count = sorted(weight), len(weight)
    low, high, mean = ordered[0], ordered[-1], sum(weight) / count
    deviation = (sum((v - mean) ** 2 for v in weight) / count) ** 0.5
    yield [low + (high - low) * part / 8 for part in (1, 3, 5, 7)]
    yield [mean + deviation * level for level in (-1.51, -0.453, 0.453, 1.51)]
    for shares in ((0, 0.15, 0.5, 0.85), (0.15, 0.5, 0.85, 1)):
        yield [ordered[min(count - 1, int(share * count))] for share in shares]


def _slow_fit(weight, importance, iterations):
    """The best of four runs of Lloyd's iteration."""
    runs = [_slow_run(weight, importance, levels, iterations) for levels in _slow_starts(weight)]
    return min(runs, key=lambda levels: _slow_error(weight, importance, levels))


def _slow_run(weight, importance, levels, iterations):
    """Lloyd's iteration of one row in Python floats, levels without members left where they are."""
    for _ in range(iterations):
        members = [[] for _ in range(4)]
        for value, mass in zip(weight, importance, strict=True):
            members[_rank(value, levels)].append((value, mass))
        for k, found in enumerate(members):
            if found:
                levels[k] = sum(v * m for v, m in found) / sum(m for _, m in found)
        levels.sort()
    return levels


def _slow_error(weight, importance, levels):
    return sum(m * (v - levels[_rank(v, levels)]) ** 2 for v, m in zip(weight, importance, strict=True))


def _errors(weight, importance, levels):
    """Weighted squared error of each row."""
    distance = (weight.unsqueeze(2) - levels.unsqueeze(1)).abs().amin(2).double()
    return (importance.expand_as(weight) * distance.square()).sum(1)


def _spread(points):
    """Weighted squared error around the weighted mean."""
    mass = sum(m for _, m in points)
    mean = sum(v * m for v, m in points) / mass
    return sum(m * (v - mean) ** 2 for v, m in points)


def _best_error(weight, importance):
    """Least error of any four levels: in one dimension the best clusters are neighbours in sorted order."""
    points = sorted(zip(weight, importance, strict=True))
    best = float("inf")
    for cuts in combinations(range(1, len(points)), 3):
        edges = (0, *cuts, len(points))
        best = min(best, sum(_spread(points[a:b]) for a, b in pairwise(edges)))
    return best


def _best_of_many(weight, importance):
    """The same by dynamic programming over running sums: for rows with too many partitions to try."""
    points = sorted(zip(weight, importance, strict=True))
    sums = [(0.0, 0.0, 0.0)]
    for v, m in points:
        mass, moment, square = sums[-1]
        sums.append((mass + m, moment + m * v, square + m * v * v))

    def cost(a, b):
        mass, moment, square = (late - early for early, late in zip(sums[a], sums[b], strict=True))
        return square - moment * moment / mass

    best = [0.0] + [float("inf")] * len(points)
    for _ in range(4):
        best = [0.0] + [min(best[a] + cost(a, b) for a in range(b)) for b in range(1, len(points) + 1)]
    return best[-1]


def test_nearest_rank_against_loop():
    g = _generator(0)
    weight = torch.randn(20, 30, generator=g)
    levels = torch.randn(20, 4, generator=g).sort(1).values
    slow = [[_rank(v, row) for v in values] for values, row in zip(weight.tolist(), levels.tolist(), strict=True)]
    assert nearest_rank(weight, levels).tolist() == slow


def test_nearest_rank_tie_goes_down():
    levels = torch.tensor([[0.0, 2, 4, 6]])
    assert nearest_rank(torch.tensor([[1.0, 3, 5, 1.01, 9, -9]]), levels).tolist() == [[0, 1, 2, 1, 3, 0]]
    assert nearest_rank(torch.ones(1, 2), torch.ones(1, 4)).tolist() == [[0, 0]]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 64, 100])
def test_quantile_levels_against_loop(n):
    weight = torch.randn(5, n, generator=_generator(1))
    slow = [[sorted(row)[int((2 * k + 1) * n / 8)] for k in range(4)] for row in weight.tolist()]
    assert quantile_levels(weight).tolist() == slow


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_fit_against_slow_lloyd(per_row, iterations):
    g = _generator(2)
    weight = torch.randn(12, 40, generator=g)
    importance = torch.rand((12, 40) if per_row else (40,), generator=g) * 5 + 0.1
    found = fit_levels(weight, importance, iterations)
    rows = zip(weight.tolist(), importance.expand(12, 40).tolist(), strict=True)
    slow = torch.tensor([_slow_fit(w, m, iterations) for w, m in rows])
    # Measured: 1.2e-6 at most (float32 sums, and differences of them).
    torch.testing.assert_close(found, slow, atol=1e-5, rtol=0)


def test_each_start_is_the_best_somewhere():
    g = _generator(9)
    weight, importance = torch.randn(60, 16, generator=g) ** 3, torch.ones(16)
    chosen = set()
    for row, found in zip(weight.tolist(), fit_levels(weight, importance, 20).tolist(), strict=True):
        runs = [_slow_run(row, [1.0] * 16, levels, 20) for levels in _slow_starts(row)]
        errors = [_slow_error(row, [1.0] * 16, levels) for levels in runs]
        chosen.add(errors.index(min(errors)))
        assert _slow_error(row, [1.0] * 16, found) <= min(errors) * (1 + 1e-5)
    assert chosen == {0, 1, 2, 3}


def test_error_never_rises():
    g = _generator(3)
    weight = torch.randn(300, 48, generator=g) ** 3
    importance = torch.rand(48, generator=g) ** 4 * 100 + 0.01
    errors = [_errors(weight, importance, fit_levels(weight, importance, n)) for n in range(1, 11)]
    for before, after in pairwise(errors):
        # Measured: no row rises by more than 6e-8 of itself.
        assert bool((after <= before * (1 + 1e-6)).all())
    # It does go on falling: 10 iterations reach 0.73 of the error of one.
    assert float(errors[-1].sum()) < 0.8 * float(errors[0].sum())


@pytest.mark.parametrize("n", [6, 7, 8])
def test_against_brute_force(n):
    g = _generator(n)
    weight = torch.randn(200, n, generator=g)
    importance = torch.rand(200, n, generator=g) * 3 + 0.05
    found = _errors(weight, importance, fit_levels(weight, importance, 50))
    best = torch.tensor([_best_error(w, m) for w, m in zip(weight.tolist(), importance.tolist(), strict=True)])
    assert bool((found >= best - 1e-6).all())
    # EM stops at local optima. Measured, sum of errors over the sum of the best: 1.27, 1.04 and 1.05, from quantiles alone 1.8,
    # 1.4 and 2.0; 76, 91 and 85 % of the rows reach the best.
    assert float(found.sum() / best.sum()) < 1.35
    assert float((found <= best * (1 + 1e-4)).float().mean()) > 0.7


def test_close_to_the_best_at_real_sizes():
    g = _generator(64)
    weight = torch.randn(20, 64, generator=g)
    importance = torch.rand(20, 64, generator=g) * 3 + 0.05
    found = _errors(weight, importance, fit_levels(weight, importance, 20))
    best = torch.tensor([_best_of_many(w, m) for w, m in zip(weight.tolist(), importance.tolist(), strict=True)])
    assert bool((found >= best * (1 - 1e-5)).all())
    # Measured, sum of errors over the sum of the best: 1.007; from quantiles alone 1.08.
    assert float(found.sum() / best.sum()) < 1.02


@pytest.mark.parametrize("n", [4, 8, 64])
def test_separated_levels_come_back(n):
    g = _generator(4)
    levels = torch.randn(50, 1, generator=g) + torch.tensor([0.0, 1, 3, 4]) * (0.5 + torch.rand(50, 1, generator=g))
    ranks = torch.stack([torch.randperm(n, generator=g) % 4 for _ in range(50)])
    weight = levels.gather(1, ranks)
    importance = torch.rand(n, generator=g) + 0.1
    # Measured: 2.1e-6 and 5.5e-6, for levels up to 6.
    for mass, tolerance in ((torch.ones(n), 1e-5), (importance, 3e-5)):
        found = fit_levels(weight, mass, 20)
        torch.testing.assert_close(found, levels, atol=tolerance, rtol=0)
        assert torch.equal(nearest_rank(weight, found), ranks)


def test_importance_by_hand():
    weight = torch.tensor([[0.0, 1, 10, 11, 20, 21, 30, 31]])
    assert fit_levels(weight, torch.ones(8), 5).tolist() == [[0.5, 10.5, 20.5, 30.5]]
    importance = torch.tensor([3.0, 1, 1, 1, 1, 3, 1, 7])
    assert fit_levels(weight, importance, 5).tolist() == [[0.25, 10.5, 20.75, 30.875]]


def test_importance_lowers_the_weighted_error():
    g = _generator(5)
    weight = torch.randn(100, 32, generator=g)
    importance = torch.rand(32, generator=g) ** 6 * 100 + 0.01
    weighted = _errors(weight, importance, fit_levels(weight, importance, 30)).sum()
    plain = _errors(weight, importance, fit_levels(weight, torch.ones(32), 30)).sum()
    assert float(weighted / plain) < 0.7  # measured: 0.52


@pytest.mark.parametrize(
    "row",
    [[2.0] * 8, [0.0] * 8, [1.0] * 7 + [5.0], [-3.0] + [1.0] * 15, [1.0, 2.0] * 8, [1.0] * 6 + [2.0, 9.0], [4.0], [1.0, 2.0]],
)
def test_empty_levels(row):
    weight = torch.tensor([row])
    for importance in (torch.ones(len(row)), torch.linspace(0.01, 3, len(row))):
        found = fit_levels(weight, importance, 20)
        assert bool(torch.isfinite(found).all())
        assert found.tolist() == [sorted(found.tolist()[0])]
        # At most three values among four levels: nothing is left over. Measured: 6e-9 where a level's only member has
        # 4e-4 of the importance (its mean is a difference of sums), else 6e-12 at most.
        assert float(_errors(weight, importance, found)) <= 1e-7
        # Levels without members stay where they are. Measured: 8e-4 for that member, else 2.4e-5 at most.
        slow = torch.tensor([_slow_fit(row, importance.tolist(), 20)])
        torch.testing.assert_close(found, slow, atol=4e-3, rtol=0)


def test_result_ascends_and_inputs_stay():
    g = _generator(6)
    weight = torch.randint(-3, 4, (200, 16), generator=g).float()
    importance = torch.rand(200, 16, generator=g) + 0.01
    kept = weight.clone(), importance.clone()
    for iterations in (0, 1, 20):
        found = fit_levels(weight, importance, iterations)
        assert found.shape == (200, 4)
        assert bool((found[:, 1:] >= found[:, :-1]).all())
    assert torch.equal(weight, kept[0])
    assert torch.equal(importance, kept[1])


def _best_entry(weight, importance, levels, step):
    """The levels of the table with the least error of weights whose ranks are those of the nearest levels."""
    ranks = [_rank(value, levels) for value in weight]
    rows = [[step * row[code] for code in (2, 0, 1, 3)] for row in TABLE_LEVELS]
    return min(rows, key=lambda row: sum(m * (v - row[k]) ** 2 for v, m, k in zip(weight, importance, ranks, strict=True)))


def test_levels_out_of_a_table_against_a_slow_loop():
    g = _generator(7)
    weight, importance = torch.randn(40, 16, generator=g), torch.rand(16, generator=g) * 3 + 0.05
    importance[3] = 1e6  # behind a massive input
    scale = (torch.rand(40, generator=g) * 0.01 + 0.03).half()
    found = fit_levels(weight, importance, 20, scale)
    for row, step, levels in zip(weight.tolist(), scale.tolist(), found.tolist(), strict=True):
        runs = []
        for start in _slow_starts(row):
            run = _slow_run(row, importance.tolist(), start, 20)
            for _ in range(5):
                run = _best_entry(row, importance.tolist(), run, step)
            runs.append(_slow_error(row, importance.tolist(), run))
        # Measured: 3e-7. Of two entries that are equally good float64 may take the other.
        assert _slow_error(row, importance.tolist(), levels) <= min(runs) * (1 + 1e-5)
        assert tuple(round(levels[rank] / step) for rank in (1, 2, 0, 3)) in TABLE_LEVELS
    # What is rounded at the end alone is worse. Measured: 0.92.
    even = torch.ones(16)
    rounded, _ = project_levels(fit_levels(weight, even, 20)[:, None], 2, scale[:, None])
    plain = _errors(weight, even, level_values(rounded, scale[:, None])[:, 0]).sum()
    assert float(_errors(weight, even, fit_levels(weight, even, 20, scale)).sum() / plain) < 0.97
