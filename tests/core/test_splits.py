"""How sequences are divided."""

from collections import Counter

import pytest

from lbllm_cli.core.splits import held_out_rows, spread_rows


@pytest.mark.parametrize("rows", [2, 3, 5, 9, 32, 64, 256, 480, 1000, 1024, 1920])
@pytest.mark.parametrize("share", [0.0625, 0.2, 0.9])
def test_rows_are_spread_one_out_of_each_part(rows, share):
    count = held_out_rows(rows, share)
    found = spread_rows(rows, count)
    assert len(set(found)) == count
    for number, row in enumerate(found):
        assert number * rows // count <= row < -(-(number + 1) * rows // count)


@pytest.mark.parametrize("pattern", ["A", "AB", "ABAC", "ABC", "ABCD", "ABCDEF"])
@pytest.mark.parametrize("rows", [256, 480, 1024])
def test_sources_that_take_turns_are_held_out_by_their_shares(pattern, rows):
    """Of every 16th row two or four sources would have all or nothing."""
    found = Counter(pattern[row % len(pattern)] for row in spread_rows(rows, held_out_rows(rows, 0.0625)))
    for source, share in Counter(pattern).items():
        expected = sum(found.values()) * share / len(pattern)
        assert abs(found[source] - expected) <= 1.5, found
