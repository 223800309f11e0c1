"""How sequences are divided."""

from collections import Counter

import pytest
import torch

from lbllm_cli.core.splits import data_seed, held_out_rows, spread_rows


@pytest.mark.parametrize("rows", [2, 3, 5, 9, 32, 64, 256, 480, 1000, 1024, 1920])
@pytest.mark.parametrize("share", [0.0625, 0.2, 0.9])
def test_rows_are_spread_one_out_of_each_part(rows, share):
    count = held_out_rows(rows, share)
    found = spread_rows(rows, count)
    assert len(set(found)) == count
    for number, row in enumerate(found):
        assert number * rows // count <= row < -(-(number + 1) * rows // count)


@pytest.mark.parametrize("rows", [43, 64, 85, 128, 480])
def test_a_sample_of_eight_is_of_all_sources(rows):
    """Of 64 rows at equal distances, 0, 9 to 63, all are of the first of three."""
    found = Counter("ABC"[row % 3] for row in spread_rows(rows, 8))
    assert min(found[source] for source in "ABC") >= 2, found


def test_each_seed_and_block_has_an_order_of_its_own():
    """A generator drops all but the low 32 bits of what it is given: seeds 0, 4 and 8 once had one order."""
    seeds = range(64)
    kept = {((data_seed(seed, index) << 10) + epoch) % (1 << 32) for seed in seeds for index in (0, 1, 79) for epoch in (0, 1)}
    assert len(kept) == 64 * 3 * 2
    drawn = (torch.randperm(32, generator=torch.Generator().manual_seed(data_seed(seed, 7) << 10)) for seed in seeds)
    assert len({tuple(order.tolist()) for order in drawn}) == 64
    assert data_seed(1, 3) == 1048579
    assert max(data_seed(2**63 + seed, 79) for seed in seeds) < 1 << 22


@pytest.mark.parametrize("pattern", ["A", "AB", "ABAC", "ABC", "ABCD", "ABCDEF"])
@pytest.mark.parametrize("rows", [256, 480, 1024])
def test_sources_that_take_turns_are_held_out_by_their_shares(pattern, rows):
    """Of every 16th row two or four sources would have all or nothing."""
    found = Counter(pattern[row % len(pattern)] for row in spread_rows(rows, held_out_rows(rows, 0.0625)))
    for source, share in Counter(pattern).items():
        expected = sum(found.values()) * share / len(pattern)
        assert abs(found[source] - expected) <= 1.5, found
