"""A GPU for every rank of a machine; what is refused where there is none, without one of them."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lbllm_cli.core.errors import UsageError
from lbllm_cli.parallel.group import ALONE, Alone, Traffic
from lbllm_cli.parallel.ranks import Ranks
from lbllm_cli.pipeline import devices
from lbllm_cli.pipeline.devices import check_devices
from lbllm_cli.runtime import backend


class Said(Alone):
    """A rank among others, which say what it is told."""

    size = 4

    def __init__(self, said):
        super().__init__()
        self.said = said

    def facts(self, value):
        return self.said


@pytest.fixture
def gpus(monkeypatch):
    """gpus(4): a machine with so many; returns the devices that were made the present one."""
    taken: list[torch.device] = []

    def machine(count: int) -> list[torch.device]:
        real = backend._made
        fake = SimpleNamespace(count=lambda: count, warn_of_kinds=lambda key: None, absence=lambda: "")
        monkeypatch.setattr(backend, "_made", lambda kind: fake if kind == "cuda" else real(kind))
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        return taken

    return machine


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_every_rank_of_a_machine_has_its_own(gpus, wanted):
    taken = gpus(4)
    found = [backend.choose_device(wanted, place=(rank, 4)) for rank in range(4)]
    assert found == taken == [torch.device("cuda", rank) for rank in range(4)]


def test_a_rank_that_was_given_one_has_that(gpus):
    taken = gpus(1)
    assert backend.choose_device("auto", place=(3, 8)) == torch.device("cuda", 0)
    assert taken == [torch.device("cuda", 0)]


def test_too_few_or_one_for_all_are_refused(gpus):
    taken = gpus(4)
    with pytest.raises(UsageError, match="8 processes run on this machine, which has 4 GPUs; start at most 4"):
        backend.choose_device("auto", place=(0, 8))
    with pytest.raises(UsageError, match=r"runtime\.device cuda:2 is one GPU, and 2 processes run on this machine"):
        backend.choose_device("cuda:2", place=(0, 2))
    assert backend.choose_device("cpu", place=(1, 2)) == torch.device("cpu")
    assert taken == []


def test_a_gpu_that_is_named_is_the_present_one(gpus):
    """What asks for "cuda" alone, as the message of memory that ran out, would ask the first one."""
    taken = gpus(4)
    assert backend.choose_device("cuda:2") == torch.device("cuda:2")
    assert backend.choose_device("auto") == torch.device("cuda")
    assert taken == [torch.device("cuda:2")]


def test_memory_that_runs_out_is_no_lost_rank():
    ranks = Ranks.__new__(Ranks)
    ranks.traffic = Traffic({})
    with pytest.raises(torch.OutOfMemoryError), ranks.call("gather", 0):
        raise torch.OutOfMemoryError("full")


def test_ranks_on_gpus_need_nccl_and_one_each(monkeypatch):
    device = torch.device("cuda", 0)
    four = Said([("a", "1"), ("a", "2"), ("b", "1"), ("a", "2")])
    of_cpu = devices.backend_of
    card = SimpleNamespace(identity=lambda device: "2")
    monkeypatch.setattr(devices, "backend_of", lambda one: card if one.type == "cuda" else of_cpu(one))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(UsageError, match="4 ranks on GPUs need NCCL, which this torch is built without"):
        check_devices(four, device)
    check_devices(four, torch.device("cpu"))
    check_devices(ALONE, device)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    with pytest.raises(UsageError, match="ranks 1 and 3 have the same GPU of a; start one rank for each GPU"):
        check_devices(four, device)
    check_devices(Said([("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]), device)
