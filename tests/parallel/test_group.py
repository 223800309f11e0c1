"""What ranks tell each other: a process by itself, and several with gloo between them."""

import math

import pytest
import torch
from parallel.of_ranks import NAMED, named, numbers, use_group, values

from lbllm_cli.parallel.group import ALONE, Alone, Group, Traffic, agree, merged, stacked
from lbllm_cli.parallel.shares import Share


def equal(found: dict, wanted: dict) -> bool:
    """Whether tensors are the same, by name, order, type and shape."""
    pairs = list(zip(found.values(), wanted.values(), strict=True))
    same = all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
    return same and list(found) == list(wanted)


def test_a_process_by_itself_answers_with_what_it_has():
    group: Group = ALONE
    assert (group.rank, group.size, group.first, group.node) == (0, 1, True, group)
    assert group.share(7) == Share(7, 0, 7)
    assert group.facts("x") == ["x"]
    assert group.told(lambda: "asked") == "asked"
    assert group.total([1.5, 2.0]) == [1.5, 2.0]
    assert group.some([True, False]) == [True, False]
    group.meet()
    tensor = torch.arange(3.0)
    group.add(tensor)
    group.send(tensor, 0)
    group.begin_spread(tensor, 0).wait()
    group.begin_reduce(tensor, 0).wait()
    assert torch.equal(tensor, torch.arange(3.0))
    (own,) = group.gathered({"t": tensor})
    assert own["t"] is tensor
    assert merged(group, {"t": tensor})["t"] is tensor
    assert stacked(group, {"t": tensor})["t"] is tensor
    assert group.norm(torch.tensor([2.0, 3.0]), torch.tensor([6.0])) == 7
    assert agree(group, {"a": 1}) == []
    assert group.traffic.bytes == {}


def test_traffic_is_counted_from_a_moment_on():
    before = Traffic({"reduce": 8}, 1.0)
    now = Traffic({"reduce": 20, "gather": 4}, 1.5)
    assert now - before == Traffic({"reduce": 12, "gather": 4}, 0.5)
    kept = now.copy()
    now.bytes["reduce"] = 0
    assert kept.bytes["reduce"] == 20


def test_agree_names_the_first_that_differs():
    class Said(Alone):
        def facts(self, value):
            return [value, {"a": 1, "b": 2}, {"a": 3, "c": 4}]

    assert agree(Said(), {"a": 1, "b": 2}) == ["  a: 1 on rank 0, 3 on rank 2", "  b: 2 on rank 0, absent on rank 2",
                                               "  c: absent on rank 0, 4 on rank 2"]  # fmt: skip


def test_ranks_know_who_they_are(left, layout):
    size, local = layout
    assert [(one["group"]["rank"], one["group"]["size"], one["group"]["first"]) for one in left] == [
        (rank, size, rank == 0) for rank in range(size)
    ]
    assert [one["group"]["node"] for one in left] == [(rank % local, local) for rank in range(size)]
    assert [one["group"]["share"] for one in left] == [Share(11, 11 * r // size, 11 * (r + 1) // size) for r in range(size)]


def test_facts_are_in_the_order_of_ranks(left, layout):
    wanted = [{"rank": rank, "text": "x" * 100 * rank} for rank in range(layout[0])]
    assert all(one["group"]["facts"] == wanted for one in left)
    assert all(one["group"]["some"] == [True, False, True] for one in left)


def test_only_the_first_is_asked(left):
    assert [one["group"]["asked"] for one in left] == [1] + [0] * (len(left) - 1)
    assert all(one["group"]["told"] == ["found by", 0] for one in left)


def test_totals_are_added_up_in_the_order_of_ranks(left, layout):
    columns = list(zip(*(numbers(rank) for rank in range(layout[0])), strict=True))
    wanted = [sum(column) for column in columns]
    assert all(one["group"]["total"] == wanted for one in left)
    assert wanted[1] == pytest.approx(math.fsum(columns[1]))


def test_sums_are_where_they_were_asked_for(left, layout):
    whole = sum(values(rank) for rank in range(layout[0]))
    for one in left:
        assert torch.equal(one["group"]["add"], whole)
        assert one["group"]["add float64"].dtype == torch.float64
        assert torch.equal(one["group"]["add float64"], whole.double())
        assert torch.equal(one["group"]["spread"], values(1))
    assert torch.equal(left[1]["group"]["send"], whole)


def test_a_reduction_within_machines_sums_over_all_of_them(left, layout):
    """The owner on each machine has the sum over all ranks, whichever machine they are of."""
    size, local = layout
    for rank, one in enumerate(left):
        place = rank % local
        wanted = sum(values(other) + 1000 * place for other in range(size))
        assert torch.equal(one["group"]["reduced"][place], wanted)
        # From the second one of this machine.
        assert torch.equal(one["group"]["spread in node"], values(rank - place + 1))


def test_everyone_has_the_tensors_of_all(left, layout):
    size, local = layout
    assert {dtype for one in NAMED for dtype, _ in one.values()} >= {torch.bfloat16, torch.uint8, torch.int8, torch.float16}
    for rank, one in enumerate(left):
        found = one["group"]["gathered"]
        assert len(found) == size
        assert all(equal(part, named(other)) for other, part in enumerate(found))
        first = rank - rank % local
        in_node = one["group"]["gathered in node"]
        assert len(in_node) == local
        assert all(equal(part, named(first + place)) for place, part in enumerate(in_node))
        assert one["group"]["gathered nothing"] == [{}] * size
        assert equal(one["group"]["merged"], {f"of {other}": values(other) for other in range(size)})
        assert equal(one["group"]["stacked"], {"x": torch.cat([values(other)[:other] for other in range(size)])})


def test_what_differs_is_named_alike_everywhere(left, layout):
    other = ["  rank: 0 on rank 0, 1 on rank 2"] if layout[0] > 2 else []
    assert all(one["group"]["agree"] == [*other, "  last: absent on rank 0, 1 on rank 1"] for one in left)


def test_norms_count_what_all_have_once(left, layout):
    size, local = layout

    def norm(ranks: range) -> float:
        return math.sqrt(sum((rank + 1) ** 2 + 2**2 for rank in ranks) + 3**2)

    for rank, one in enumerate(left):
        first = rank - rank % local
        assert float(one["group"]["norm"]) == pytest.approx(norm(range(size)))
        assert float(one["group"]["norm in node"]) == pytest.approx(norm(range(first, first + local)))
        assert float(one["group"]["norm of nothing"]) == 3


def test_bytes_are_those_of_the_tensors(left, layout):
    size, local = layout

    def padded(rank: int) -> int:
        return sum(-(-tensor.nbytes // 16) * 16 for tensor in named(rank).values())

    for rank, one in enumerate(left):
        first = rank - rank % local
        between = {"all-reduce between nodes": 48} if local < size else {}
        assert {name: count for name, count in one["group"]["bytes"].items() if count} == {
            "add": {"all-reduce": 48},
            "add float64": {"all-reduce": 96},
            "send": {"reduce": 48},
            "spread": {"broadcast": 48},
            # One tensor for each rank of the machine; its own one then goes between machines.
            "reduced": {"reduce": 48 * local} | between,
            "spread in node": {"broadcast": 48},
            "gathered": {"gather": max(padded(other) for other in range(size))},
            "gathered in node": {"gather": max(padded(first + place) for place in range(local))},
            "norm": {"all-reduce": 4},
            "norm in node": {"all-reduce": 4},
            "norm of nothing": {"all-reduce": 4},
            "merged": {"gather": 48},
            "stacked": {"gather": 16 * (size - 1)},
        }
        assert one["group"]["waited"] > 0


def test_a_process_by_itself_is_asked_the_same():
    """The calls that several ranks make are those that one makes."""
    found = use_group(ALONE)
    assert found["bytes"] == {name: {} for name in found["bytes"]}
    assert found["norm"] == pytest.approx(math.sqrt(1 + 4 + 9))
