"""How many threads there are to be had."""

from lbllm_cli.engine import threads


def test_what_is_asked_for_comes_first(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert threads.usual_threads() == 3
    for odd in ("", "0", "x"):
        monkeypatch.setenv("OMP_NUM_THREADS", odd)
        assert threads.usual_threads() >= 1


def test_hyperthreads_count_once_and_a_container_has_a_limit(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(threads, "_siblings", lambda number: str(number % 2))
    monkeypatch.setattr(threads, "_quota", lambda: 8)
    assert threads.usual_threads() == 2
    monkeypatch.setattr(threads, "_quota", lambda: 1)
    assert threads.usual_threads() == 1
