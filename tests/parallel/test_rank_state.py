"""Unfinished training of several ranks: after a crash all go on from the last step that all have kept."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lbllm_cli.core.errors import UsageError
from lbllm_cli.parallel.group import Alone
from lbllm_cli.pipeline.training_state import TrainingState


class Crash(Exception):
    """Of a process, at the moment that it is raised."""


class Threads(Alone):
    """Ranks that are threads of this process. meeting: shared by them. crash: what a rank does instead of meeting others."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, said: list, crash: Callable[[], None] | None = None):
        super().__init__()
        self.rank, self.size, self.meeting, self.said, self.crash = rank, size, meeting, said, crash

    def meet(self):
        if self.crash is not None:
            self.crash()
        self.meeting.wait(20)

    def facts(self, value):
        self.said[self.rank] = value
        self.meet()
        found = list(self.said)
        self.meeting.wait(20)
        return found


def together(size: int, work: Callable, crashes: dict[int, Callable[[], None]] | None = None) -> list:
    """What `work(group)` gives on every rank; an exception in its place where one ended it."""
    meeting, said, found = threading.Barrier(size), [None] * size, [None] * size

    def one(rank: int) -> None:
        try:
            found[rank] = work(Threads(rank, size, meeting, said, (crashes or {}).get(rank)))
        except Exception as error:
            found[rank] = error
            meeting.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def save(folder: Path, step: int, epoch: int = 0, block: int = 0, size: int = 2, crashes=None) -> list:
    """All ranks keep a step; each has tensors of its own."""

    def work(group):
        TrainingState(folder, 1, group).save(
            {"t": torch.tensor([step, group.rank])}, {"block": block, "epoch": epoch, "step": step}
        )

    return together(size, work, crashes)


def load(folder: Path, block: int = 0, size: int = 2) -> list[tuple[int, int] | None]:
    """Epoch and step that each rank goes on from; its tensors are those of the step and its own."""

    def work(group):
        kept = TrainingState(folder, 1, group).load(block)
        if kept is None:
            return None
        tensors, facts = kept
        assert tensors["t"].tolist() == [facts["step"], group.rank]
        return facts["epoch"], facts["step"]

    return together(size, work)


def crash() -> None:
    raise Crash


@pytest.mark.parametrize("size", [2, 3])
def test_all_go_on_from_what_all_have_saved(tmp_path, size):
    assert load(tmp_path, size=size) == [None] * size
    assert save(tmp_path, 1, size=size) == [None] * size
    assert save(tmp_path, 2, size=size) == [None] * size
    assert load(tmp_path, size=size) == [(0, 2)] * size
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"training.{rank:03d}.safetensors" for rank in range(size)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_crash_before_all_have_written_goes_back_to_the_step_before(tmp_path, rank):
    save(tmp_path, 2)
    # One is gone before it has written anything; the other waits for it with its file in place.
    other = 1 - rank
    found = together(
        2,
        lambda group: crash() if group.rank == rank else TrainingState(tmp_path, 1, group).save(
            {"t": torch.tensor([3, other])}, {"block": 0, "epoch": 0, "step": 3}
        ),
    )  # fmt: skip
    assert isinstance(found[rank], Crash)
    assert isinstance(found[other], threading.BrokenBarrierError)
    assert (tmp_path / f"training.{other:03d}.next.safetensors").exists()
    assert load(tmp_path) == [(0, 2), (0, 2)]
    # What was left of it is in nobody's way.
    assert save(tmp_path, 3) == save(tmp_path, 4) == [None, None]
    assert load(tmp_path) == [(0, 4), (0, 4)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_crash_between_two_ranks_replacing_their_files_goes_on_from_the_new_step(tmp_path, rank):
    save(tmp_path, 2)
    own = tmp_path / f"training.{rank:03d}.safetensors"
    before = own.read_bytes()
    save(tmp_path, 3)
    # As if one had been killed after all met and before it replaced its own.
    shutil.move(own, tmp_path / f"training.{rank:03d}.next.safetensors")
    own.write_bytes(before)
    assert load(tmp_path) == [(0, 3), (0, 3)]


def test_a_crash_while_all_stand_at_the_meeting_goes_on_from_the_new_step(tmp_path):
    save(tmp_path, 2)
    for rank, error in enumerate(save(tmp_path, 1, epoch=1, crashes={0: crash, 1: crash})):
        assert isinstance(error, Crash), rank
    assert {f.name for f in tmp_path.glob("*.next.safetensors")} == {f"training.{r:03d}.next.safetensors" for r in (0, 1)}
    # A later epoch, though its step's number is a lower one.
    assert load(tmp_path) == [(1, 1), (1, 1)]


def test_what_one_rank_has_lost_nobody_goes_on_from(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "training.001.safetensors").unlink()
    assert load(tmp_path) == [None, None]


def test_training_of_another_block_counts_as_nothing_on_any_rank(tmp_path):
    """One has committed and cleared; the other was killed before it did."""
    save(tmp_path, 7, block=3)
    together(2, lambda group: TrainingState(tmp_path, 1, group).clear() if group.rank == 0 else None)
    assert load(tmp_path, block=4) == [None, None]
    assert save(tmp_path, 1, block=4) == [None, None]
    assert load(tmp_path, block=4) == [(0, 1), (0, 1)]


def test_a_damaged_file_is_refused_by_the_rank_that_has_it(tmp_path):
    save(tmp_path, 2)
    file = tmp_path / "training.001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert any(isinstance(found, UsageError) and "training.001.safetensors is damaged" in str(found) for found in load(tmp_path))


def test_a_finished_stage_forgets_what_all_ranks_have_kept(tmp_path):
    save(tmp_path, 2)
    TrainingState(tmp_path, 1).save({}, {"block": 0, "epoch": 0, "step": 1})
    save(tmp_path, 3, crashes={0: crash, 1: crash})
    assert len(list(tmp_path.iterdir())) == 5
    TrainingState.forget(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_what_was_gone_on_from_stays_until_all_have_a_later_one(tmp_path, rank):
    """A save that was cut off, its step gone on from, and the next one cut off as well."""
    save(tmp_path, 2)
    older = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save(tmp_path, 3)
    # One rank was about to put its file in place.
    own = tmp_path / f"training.{rank:03d}.safetensors"
    own.rename(own.with_name(f"training.{rank:03d}.next.safetensors"))
    own.write_bytes(older[own.name])
    assert load(tmp_path) == [(0, 3), (0, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(older)
    found = save(tmp_path, 4, crashes={1 - rank: crash})
    assert any(isinstance(one, Crash) for one in found)
    assert load(tmp_path) in ([(0, 3), (0, 3)], [(0, 4), (0, 4)])


def test_what_all_have_alike_comes_from_the_first_rank(tmp_path):
    def keep(group):
        tensors = {"t": torch.tensor([group.rank])}
        if group.first:
            tensors |= {"copy.0/value": torch.tensor([7.0]), "best/a": torch.tensor([8.0])}
        TrainingState(tmp_path, 1, group).save(tensors, {"block": 0, "epoch": 1, "step": 5})

    assert together(3, keep) == [None] * 3
    for rank, (tensors, _) in enumerate(together(3, lambda group: TrainingState(tmp_path, 1, group).load(0))):
        assert {name: tensor.item() for name, tensor in tensors.items()} == {"t": rank, "copy.0/value": 7, "best/a": 8}
