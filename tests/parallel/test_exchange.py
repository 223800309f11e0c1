"""Gradients on their way between ranks: what each is left with is what one process with all rows has."""

import gc
import weakref

import pytest
import torch
from parallel.of_ranks import STEPS, Experts, alone, step
from torch import nn

from lbllm_cli.parallel.group import ALONE, Alone
from lbllm_cli.training import exchange as exchanging
from lbllm_cli.training.exchange import Exchange, _buckets

WEIGHTS = ("never", "in", "even", "odd")
COPIES = ("gain", "unused", "shift", "tail")


@pytest.mark.parametrize("name", STEPS)
def test_owners_have_the_gradients_of_all_rows(left, layout, name):
    size, local = layout
    wanted = alone(name, size)
    assert wanted["never"] is None
    for rank, one in enumerate(left):
        found = one["exchange"][name]
        for place, weight in enumerate(WEIGHTS):
            if wanted[weight] is None or place % local != rank % local:
                assert found[weight] is None
            else:
                close(found[weight], wanted[weight])


@pytest.mark.parametrize("name", STEPS)
def test_everyone_has_the_gradients_of_copies(left, layout, name):
    wanted = alone(name, layout[0])
    assert wanted["unused"] is None
    for one in left:
        found = one["exchange"][name]
        for copy in COPIES:
            if wanted[copy] is None:
                assert found[copy] is None
            else:
                close(found[copy], wanted[copy])
        # To the last bit: what every rank moves by itself stays alike.
        assert all(same(found[copy], left[0]["exchange"][name][copy]) for copy in COPIES)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Measured 6.6e-7 of the largest gradient at most, over all steps and layouts."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-6


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other is None or torch.equal(one, other)


def test_the_steps_are_those_that_they_are_named_after():
    """Weights and copies that some ranks use and others do not, and ranks without a row."""
    assert alone("an expert nowhere", 2)["odd"] is alone("only rows that read no shift", 2)["shift"] is None
    assert alone("an expert on one rank", 2)["odd"] is not None
    assert [] in STEPS["a rank without rows"][:2]


class Noting(Alone):
    """Several ranks, of which this one takes note of what is sent off, and when."""

    rank, size = 0, 2

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[torch.Tensor, torch.Tensor]] = []

    def begin_reduce(self, tensor, rank):
        self.sent.append((tensor, tensor.clone()))
        return super().begin_reduce(tensor, rank)


@pytest.mark.parametrize("micro", [[[0, 1]], [[0, 1], [2, 3]], [[0, 1], [2]], [[0], [1], [2], [3]]])
def test_no_gradient_is_sent_before_it_is_whole(micro):
    """Of two micro-batches the first has made a gradient of every weight when the second one's backward pass begins."""
    group = Noting()
    student = Experts(ALONE)
    step(student, Exchange(student, group), micro, 4)
    assert len(group.sent) == len(WEIGHTS)
    # What is in a gradient's memory after the step is what was there as it was sent.
    assert all(torch.equal(now, then) for now, then in group.sent)


def test_gradients_leave_while_the_backward_pass_goes_on():
    """The last linear's is on its way before the first one has any."""
    group = Noting()
    student = Experts(ALONE)
    exchange, under_way = Exchange(student, group), []
    # Called after the exchange's own.
    student.weights["in"].register_post_accumulate_grad_hook(lambda _: under_way.append(len(group.sent)))
    exchange.last()
    student.loss([0, 1]).backward()
    # Experts, and it itself; the one that no row goes to waits for the end.
    assert under_way == [3]
    assert [one.shape for one, _ in group.sent] == [(4, 6), (4, 6), (6, 5)]
    exchange.weights_done()
    assert len(group.sent) == len(WEIGHTS)


def test_micro_batches_before_the_last_send_nothing():
    group = Noting()
    student = Experts(ALONE)
    exchange = Exchange(student, group)
    student.loss([0, 1]).backward()
    assert not group.sent
    exchange.last()
    student.loss([2, 3]).backward()
    assert len(group.sent) == 3


def test_nothing_keeps_a_student_that_is_done_with():
    """A finished block's would have stayed on the device: no collector of Python's sees what goes round through torch's hooks."""
    student = Experts(ALONE)
    exchange, gone = Exchange(student, Noting()), weakref.ref(student.weights["in"])
    step(student, exchange, [[0, 1]], 2)
    del student, exchange
    gc.collect()
    assert gone() is None


def test_a_process_by_itself_exchanges_nothing():
    student = Experts(ALONE)
    exchange = Exchange(student, ALONE)
    assert (exchange.weights, exchange.copies) == ([], [])


def test_buckets_have_one_type_each_and_a_largest_size(monkeypatch):
    monkeypatch.setattr(exchanging, "_BUCKET", 100)
    sizes = [(10, torch.float32), (15, torch.float32), (1, torch.float32), (8, torch.float64), (60, torch.float32),
             (5, torch.bfloat16), (45, torch.bfloat16)]  # fmt: skip
    parameters = [nn.Parameter(torch.zeros(count, dtype=dtype)) for count, dtype in sizes]
    buckets = list(_buckets(parameters))
    # 100 bytes are not too many; what is larger by itself has a bucket of its own.
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[10, 15], [1], [8], [60], [5, 45]]
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in parameters]
    assert list(_buckets([])) == []


def test_gradients_of_several_buckets_find_their_places(monkeypatch):
    class Double(Alone):
        """Two ranks that have the same."""

        size = 2

        def add(self, tensor):
            tensor *= 2

    monkeypatch.setattr(exchanging, "_BUCKET", 20)
    student = Experts(ALONE)
    exchange = Exchange(student, Double())
    student.loss([0, 1, 4, 5]).backward()
    before = student.gradients()
    exchange.copies_done()
    after = student.gradients()
    assert after["unused"] is None
    for name in ("gain", "shift", "tail"):
        assert torch.equal(after[name], 2 * before[name])
