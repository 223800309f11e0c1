"""Ranks that are lost, that fail and that do not fit together: all end, with one message and its exit code."""

import os
import signal
import time

import pytest
from parallel.of_ranks import Times, fail, nothing, other_library, refuse, wait, watched
from parallel.processes import run, started, variables

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")
AGAIN = "run the same command again to resume"


def disturbed(tmp_path, size: int, rank: int, signum: int, times: Times):
    """All ranks but one wait for it, and a signal ends or stops it; how the others ended, and after how many seconds."""
    with started(variables(size), watched, wait, tmp_path, rank, times) as ranks:
        ranks.until((tmp_path / "apart").exists)
        time.sleep(0.2)
        began = time.monotonic()
        os.kill(ranks.processes[rank].pid, signum)
        found = ranks.wait(*(other for other in range(size) if other != rank))
        return found, time.monotonic() - began


# Each waits for ten seconds, and one of them tells what the other does.
@pytest.mark.parametrize(
    ("size", "rank"), [pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.heavy), (2, 0)]
)
def test_a_rank_that_is_killed_ends_the_others(tmp_path, size, rank):
    """Rank 0 serves the store, which is gone with it. Times of a beat are those of a user."""
    found, seconds = disturbed(tmp_path, size, rank, signal.SIGKILL, Times(3.0, 45.0, 300.0, 20.0))
    assert [ended.code for ended in found] == [1] * (size - 1)
    (message,) = [line for ended in found for line in ended.messages]
    assert message.startswith("lbllm: the ranks have lost each other (")
    assert message.endswith(f"; {AGAIN}")
    # Measured 9.1 s where rank 0 has waited for last words and for others to read its own, 0.1 s where it is the one.
    assert seconds < 30


def test_a_rank_that_stands_still_ends_the_others(tmp_path):
    """Its connections stay open: only its beats are missing."""
    found, seconds = disturbed(tmp_path, 2, 1, signal.SIGSTOP, Times(lost=2.0))
    assert [ended.code for ended in found] == [1]
    assert found[0].said == f"lbllm: rank 1 has been silent for 2 seconds; {AGAIN}\n"
    assert 2 < seconds < 30  # measured 2.6


def test_the_rank_that_serves_the_store_stands_still(tmp_path):
    """Nobody answers a question about its beats."""
    found, seconds = disturbed(tmp_path, 2, 0, signal.SIGSTOP, Times(lost=2.0))
    assert [ended.code for ended in found] == [1]
    assert found[0].said == f"lbllm: the rank that the others meet at has been silent for too long; {AGAIN}\n"
    assert 2 < seconds < 30  # measured 2.4


def test_a_run_that_was_stopped_as_a_whole_goes_on(tmp_path):
    """As by Ctrl-Z and `fg`: each finds the others silent for as long as it was itself."""
    with started(variables(2), watched, wait, tmp_path, 1, Times(lost=2.0)) as ranks:
        ranks.until((tmp_path / "apart").exists)
        time.sleep(0.5)
        for process in reversed(ranks.processes):
            os.kill(process.pid, signal.SIGSTOP)
            # The first one sees the last beat of the second.
            time.sleep(0.4)
        time.sleep(3.0)
        for process in ranks.processes:
            os.kill(process.pid, signal.SIGCONT)
            # The first one looks before the second has beaten again.
            time.sleep(0.7)
        time.sleep(1.3)
        assert [ranks.said(rank) for rank in range(2)] == ["", ""]
        assert [process.exitcode for process in ranks.processes] == [None, None]


def test_a_rank_that_never_comes(tmp_path):
    """The others stand in the wait for it that all begin with."""
    (ended,) = run(variables(2)[:1], watched, nothing, tmp_path, 0, Times(late=2.0))
    assert ended.code == 1
    assert ended.messages == [f"lbllm: rank 1 has not come within 2 seconds; {AGAIN}"]


@pytest.mark.parametrize(("size", "rank"), [(2, 1), (2, 0), (3, 1)])
def test_a_mistake_of_one_rank_is_said_once(tmp_path, size, rank):
    found = run(variables(size), watched, refuse, tmp_path, rank, Times())
    assert [ended.code for ended in found] == [2] * size
    assert [ended.messages for ended in found] == [["lbllm: rates.txt holds no rates"] if r == rank else [] for r in range(size)]
    assert found[rank].said == "lbllm: rates.txt holds no rates\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bug_on_one_rank_leaves_its_traceback_and_nothing_else(tmp_path, rank):
    found = run(variables(2), watched, fail, tmp_path, rank, Times())
    assert [ended.code for ended in found] == [1, 1]
    assert "ZeroDivisionError: of a bug" in found[rank].said
    assert "Traceback" not in found[1 - rank].said
    assert [ended.messages for ended in found] == [[], []]


@pytest.mark.parametrize("rank", [0, 1])
def test_other_libraries_are_refused(tmp_path, rank):
    found = run(variables(2), watched, other_library, tmp_path, rank, Times())
    assert [ended.code for ended in found] == [2, 2]
    (message,) = [ended.said for ended in found if ended.messages]
    assert message.startswith("lbllm: ranks have different versions of libraries:\n  numpy: ")
    assert f"0.0.1 on rank {rank}" in message
    assert message.count("lbllm: ") == message.count("numpy") == 1


def test_machines_with_other_numbers_of_ranks_are_refused(tmp_path):
    ranks = variables(3, 2)
    ranks[2]["LOCAL_WORLD_SIZE"] = "1"
    found = run(ranks, watched, nothing, tmp_path, 0, Times())
    assert [ended.code for ended in found] == [2, 2, 2]
    assert [line for ended in found for line in ended.messages] == [
        "lbllm: machines have 1 to 2 ranks; start equally many on each"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "WORLD_SIZE is 2, but 'RANK' is missing; start several processes with torchrun"),
        ({"MASTER_PORT": None}, "WORLD_SIZE is 2, but 'MASTER_PORT' is missing; start several processes with torchrun"),
        ({"RANK": "2"}, "rank 2 of 2, 1 of 2: start them with torchrun"),
        ({"LOCAL_RANK": "x"}, "WORLD_SIZE is 2, but invalid literal for int() with base 10: 'x'; start several processes with "
         "torchrun"),
        ({"WORLD_SIZE": "3.5"}, "WORLD_SIZE is 3.5, but invalid literal for int() with base 10: '3.5'; start several processes "
         "with torchrun"),
    ],
)  # fmt: skip
def test_half_of_what_torchrun_says_is_refused(lbllm, monkeypatch, changes, message):
    from lbllm_cli.core.errors import UsageError
    from lbllm_cli.parallel.launch import launch

    for key, value in (variables(2)[1] | changes).items():
        if value is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, value)
    with pytest.raises(UsageError) as refused:
        launch()
    assert str(refused.value) == message


def test_half_of_what_torchrun_says_ends_a_command(tmp_path):
    own = {key: value for key, value in variables(2)[1].items() if key != "RANK"}
    (ended,) = run([own], watched, nothing, tmp_path, 0, Times())
    assert ended.code == 2
    assert ended.said == "lbllm: WORLD_SIZE is 2, but 'RANK' is missing; start several processes with torchrun\n"


def test_ranks_that_end_well_end_with_nothing_said(tmp_path):
    found = run(variables(3), watched, nothing, tmp_path, 0, Times())
    assert [(ended.code, ended.said) for ended in found] == [(0, "")] * 3
