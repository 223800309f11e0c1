"""Who has what: shares of rows, rows of a training step, owners of work."""

from itertools import combinations_with_replacement, product

import pytest

from lbllm_cli.parallel.shares import Owners, Share, share_of, step_rows

# Rows, ranks.
SIZES = [(rows, size) for rows in (0, 1, 2, 3, 5, 7, 8, 31, 64, 100) for size in (1, 2, 3, 4, 7, 8, 16)]


@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_every_row_is_in_one_share(rows, size):
    shares = [share_of(rows, rank, size) for rank in range(size)]
    assert [row for share in shares for row in range(rows)[share.slice]] == list(range(rows))
    assert {share.rows for share in shares} == {rows}
    lengths = [len(share) for share in shares]
    assert sum(lengths) == rows
    assert max(lengths) - min(lengths) <= 1


def test_own_and_within_are_what_counting_gives():
    for rows, size in SIZES:
        if rows > 31:
            continue
        for rank in range(size):
            share = share_of(rows, rank, size)
            numbered = {row: place for place, row in enumerate(range(share.start, share.stop))}
            asked = [*range(0, rows, 2), *range(1, rows, 2)]
            assert share.own(asked) == [numbered[row] for row in asked if row in numbered]
            for first in range(rows + 1):
                for end in range(first, rows + 1):
                    low, high = share.within(first, end)
                    assert list(range(low, high)) == [numbered[row] for row in range(first, end) if row in numbered]
    assert Share(6, 4, 6).within(4, 8) == Share(6, 0, 6).within(0, 2) == (0, 2)


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (7, 2), (8, 2), (30, 4), (31, 8), (5, 9)])
def test_steps_of_one_rank_are_batches(rows, batch):
    steps = -(-rows // batch)
    pieces = [list(range(rows))[slice(*step_rows(step, batch, rows, rows))] for step in range(steps)]
    assert pieces == [list(range(rows))[start : start + batch] for start in range(0, rows, batch)]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("batch", [2, 3, 4, 8, 15])
@pytest.mark.parametrize("every", [16, 30, 31, 64, 97])
def test_every_rank_goes_through_its_rows_at_one_pace(every, batch, size):
    # As after sequences are held out: shares that differ by more than one.
    owned = [len(share_of(every, rank, size)) for rank in range(size)]
    owned[0], owned[-1] = owned[0] - 1, owned[-1] + 1
    steps = -(-every // batch)
    for own in owned:
        pieces = [step_rows(step, batch, own, every) for step in range(steps)]
        assert [row for first, end in pieces for row in range(first, end)] == list(range(own))
        for step, (_, end) in enumerate(pieces[:-1], start=1):
            # Never ahead of the share of all rows that are due, and behind it by less than a row.
            assert 0 <= step * batch * own / every - end < 1
    for step in range(steps - 1):
        whole = sum(end - first for first, end in (step_rows(step, batch, own, every) for own in owned))
        assert abs(whole - batch) < size


@pytest.mark.parametrize(("size", "most"), [(1, 1.0), (2, 7 / 6), (3, 11 / 9)])
def test_no_owner_has_much_more_than_it_must(size, most):
    """most: what the greedy order loses in the worst of these cases; it is known to lose no more than 4/3 - 1/(3 size)."""
    assert most <= 4 / 3 - 1 / (3 * size) + 1e-9
    lost = []
    for costs in (*combinations_with_replacement((1.0, 2.0, 3.0), 5), *combinations_with_replacement((3.0, 4.0, 5.0), 7)):
        work = {f"linear {place}": cost for place, cost in enumerate(costs)}
        owners = Owners(size)
        given = owners.give(work)
        loads = [sum(cost for name, cost in work.items() if given[name] == rank) for rank in range(size)]
        assert owners.loads == loads
        lost.append(max(loads) / least(costs, size))
    assert max(lost) == pytest.approx(most)


def least(costs: tuple[float, ...], size: int) -> float:
    """The largest load of the best division, by trying all."""
    return min(
        max(sum(cost for cost, owner in zip(costs, split, strict=True) if owner == rank) for rank in range(size))
        for split in product(range(size), repeat=len(costs))
    )


def test_owners_are_the_same_on_every_rank_and_go_on_from_what_was_given():
    work = {"b": 2.0, "a": 3.0, "c": 2.0, "d": 2.0}
    assert Owners(2).give(work) == Owners(2).give(dict(work)) == {"b": 1, "a": 0, "c": 1, "d": 0}
    assert list(Owners(2).give(work)) == list(work)
    owners = Owners(2)
    owners.give({"large": 5.0})
    # The next block's work goes to those that have least of the ones before.
    assert owners.give({"x": 2.0, "y": 2.0}) == {"x": 1, "y": 1}
    assert Owners(2).give({}) == {}
