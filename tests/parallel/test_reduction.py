"""On what a reduction waits, on a device that there is none of: operations and streams that take notes."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lbllm_cli.parallel.reduction import Reductions


class Gradient:
    """What a tensor of a device says of itself."""

    is_cpu, nbytes, device = False, 12, torch.device("cuda", 1)


class Notes:
    """What was done, in order, and on which stream."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.stream = SimpleNamespace(name="computing")

    def note(self, what: str) -> None:
        self.done.append(f"{what} ({self.stream.name})")

    def work(self, what: str) -> SimpleNamespace:
        self.note(what)
        return SimpleNamespace(wait=lambda: self.note(f"waits for {what}"), is_completed=lambda: False)

    @contextmanager
    def call(self, kind: str, size: int) -> Iterator[None]:
        yield


@pytest.fixture
def notes(monkeypatch) -> Notes:
    found = Notes()

    def aside(device: torch.device) -> SimpleNamespace:
        assert device == Gradient.device
        found.note("makes a stream")
        return SimpleNamespace(name="aside", wait_stream=lambda other: found.note(f"aside waits for {other.name}"))

    monkeypatch.setattr(torch, "Stream", aside)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: found.stream)
    monkeypatch.setattr(torch.accelerator, "set_stream", lambda stream: setattr(found, "stream", stream))
    monkeypatch.setattr(dist, "reduce", lambda *_, **__: found.work("reduce"))
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: found.work("sum over machines"))
    return found


def ranks_of(notes: Notes, rank: int, across: object) -> SimpleNamespace:
    return SimpleNamespace(rank=rank, handle=None, across=across, call=notes.call)


def test_an_owner_adds_up_over_machines_beside_what_is_computed(notes):
    reductions = Reductions(ranks_of(notes, 0, object()))
    first = reductions.begin(Gradient, 0)
    assert notes.done == [
        "makes a stream (computing)", "aside waits for computing (computing)", "reduce (aside)", "waits for reduce (aside)",
        "sum over machines (aside)",
    ]  # fmt: skip
    notes.done.clear()
    reductions.begin(Gradient, 1)  # another's: there is nothing to be added up here
    assert notes.done == ["aside waits for computing (computing)", "reduce (aside)", "waits for reduce (aside)"]
    notes.done.clear()
    first.wait()
    assert notes.done == ["waits for sum over machines (computing)"]


def test_on_one_machine_nothing_is_done_aside(notes):
    pending = Reductions(ranks_of(notes, 0, None)).begin(Gradient, 0)
    assert notes.done == ["reduce (computing)"]
    pending.wait()
    assert set(notes.done[1:]) == {"waits for reduce (computing)"}


def test_in_ram_sums_over_machines_begin_in_order_as_soon_as_they_can(notes, monkeypatch):
    class InRam:
        is_cpu, nbytes, device = True, 12, torch.device("cpu")

        def __init__(self, name: str):
            self.name, self.over = name, False

    def reduce(tensor: InRam, **_: object) -> SimpleNamespace:
        notes.note(f"reduce {tensor.name}")
        return SimpleNamespace(wait=lambda: None, is_completed=lambda: tensor.over)

    monkeypatch.setattr(dist, "reduce", reduce)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: notes.work(f"sum {tensor.name}"))
    reductions, a, b, c = Reductions(ranks_of(notes, 0, object())), InRam("a"), InRam("b"), InRam("c")
    pending = [reductions.begin(a, 0)]
    b.over = True  # not before a
    pending.append(reductions.begin(b, 0))
    assert [what.split(" (")[0] for what in notes.done] == ["reduce a", "reduce b"]
    a.over = True
    pending.append(reductions.begin(c, 0))
    assert [what.split(" (")[0] for what in notes.done[2:]] == ["reduce c", "sum a", "sum b"]
    notes.done.clear()
    pending[0].wait()
    assert [what.split(" (")[0] for what in notes.done] == ["sum c", "waits for sum a"]


def test_a_stream_is_given_back_when_an_operation_fails(notes, monkeypatch):
    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("gone")

    monkeypatch.setattr(dist, "reduce", lost)
    with pytest.raises(RuntimeError, match="gone"):
        Reductions(ranks_of(notes, 0, object())).begin(Gradient, 0)
    assert notes.stream.name == "computing"
