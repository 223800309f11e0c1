"""Passages that come again."""

import pytest
import torch
from texts import calibrate, numbered

from lbllm_cli.core.errors import UsageError
from lbllm_cli.data.repeats import with_repeats
from lbllm_cli.data.sources import check, expand
from lbllm_cli.recipe.text import Source


def passages(row: list[int]) -> list[tuple[int, int]]:
    """Of a row of numbers that all differed, how it was put together: sizes of A and B of each A B A, the last one cut off."""
    found, start = [], 0
    while start < len(row):
        first = row[start]
        again = next((at for at in range(start + 1, len(row)) if row[at] == first), None)
        if again is None:
            break
        # What follows the second A is text that was not there before: one more than the largest so far.
        fresh = max(row[start:again]) + 1
        stop = next((at for at in range(again, len(row)) if row[at] == fresh), len(row))
        size = stop - again
        assert row[again:stop] == row[start : start + size]
        if stop < len(row):
            found.append((size, again - start - size))
        start = stop
    return found


@pytest.mark.parametrize("length", [64, 512, 1000])
def test_passages_come_again_behind_others(length):
    rows = torch.arange(40 * length).view(40, length)
    sizes = []
    for before, row in zip(rows.tolist(), with_repeats(rows, 1.0, 3).tolist(), strict=True):
        assert len(row) == length
        assert row[0] == before[0]
        # Its own text, in order, and nothing else.
        assert list(dict.fromkeys(row)) == before[: len(set(row))]
        assert len(set(row)) < length
        sizes += passages(row)
    least = length // 32
    assert all(least <= size <= length // 4 and least <= between <= length // 2 for size, between in sizes)
    # Cuts are drawn, over the whole range: with 40 rows both ends are nearly reached.
    assert min(size for size, _ in sizes) < length / 24
    assert max(size for size, _ in sizes) > length / 5
    assert max(between for _, between in sizes) > length / 3


@pytest.mark.parametrize(("share", "changed"), [(0.0, 0), (0.25, 5), (0.26, 5), (0.5, 10), (1.0, 20)])
def test_a_share_of_the_rows_is_rewritten(share, changed):
    rows = torch.arange(20 * 64).view(20, 64)
    found = with_repeats(rows, share, 0)
    assert int((found != rows).any(1).sum()) == changed
    assert torch.equal(with_repeats(rows, share, 0), found)
    assert torch.equal(rows, torch.arange(20 * 64).view(20, 64)), "what was given stays as it was"
    if 0 < share < 1:
        assert not torch.equal((with_repeats(rows, share, 1) != rows).any(1), (found != rows).any(1))


@pytest.mark.parametrize("length", [8, 9, 31])
def test_short_rows_are_filled(length):
    rows = torch.arange(30 * length).view(30, length)
    found = with_repeats(rows, 1.0, 0)
    assert found.shape == rows.shape
    assert bool((found.diff(dim=1) < 0).any(1).all())


def test_a_source_has_its_own_share(tmp_path, tokenizer):
    plain, other = numbered(tmp_path, "a", 0, 4096), numbered(tmp_path, "b", 5000, 4096)
    rows = calibrate([plain, other.model_copy(update={"repeats": 0.5})], tokenizer, 32, 64, seed=4)
    again = [len(set(row)) < 64 for row in rows.tolist()]
    of_other = [row[0] >= 5000 for row in rows.tolist()]
    assert sum(again) == 8
    assert all(which for which, found in zip(of_other, again, strict=True) if found)
    # Which windows are read is the same with repeats and without.
    assert torch.equal(rows[:, 0], calibrate([plain, other], tokenizer, 32, 64, seed=4)[:, 0])


def test_a_model_is_not_evaluated_on_repeats():
    item = Source(source="builtin:evaluation/novels", repeats=0.5)
    check(item, evaluating=False)
    with pytest.raises(UsageError, match="repeats is for text to train on"):
        check(item, evaluating=True)


def test_bundled_styles_keep_it():
    assert [item.repeats for item in expand([Source(source="builtin:training", repeats=0.25)])] == [0.25] * 3
