"""Several processes of one run on this machine, with what torchrun would tell them; the first one serves what they meet at.

They are forked from a process that has the libraries already: importing these is most of what a short test costs.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["parallel.of_ranks", "lbllm_cli.cli.app", "lbllm_cli.pipeline.runner", "transformers.models.llama.modeling_llama"]
)


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    said: str

    @property
    def messages(self) -> list[str]:
        """Lines that are for the user; libraries have their own beside them."""
        return [line for line in self.said.splitlines() if line.startswith("lbllm: ")]


class Ranks(NamedTuple):
    """Processes that run. folder: of what they say."""

    processes: list[BaseProcess]
    folder: Path

    def said(self, rank: int) -> str:
        """What one has written to stderr."""
        return (self.folder / f"{rank}.err").read_text()

    def wait(self, *ranks: int, seconds: float = 60) -> list[Ended]:
        """Waits for the ends of some, or of all."""
        end, found = time.monotonic() + seconds, []
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].join(max(0.0, end - time.monotonic()))
            code = self.processes[rank].exitcode
            assert code is not None, f"rank {rank} still runs: {self.said(rank)}"
            found.append(Ended(code, self.said(rank)))
        return found

    def until(self, true: Callable[[], bool], seconds: float = 60) -> None:
        """Waits for something while all run."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end
            for rank, process in enumerate(self.processes):
                assert process.is_alive(), self.said(rank)
            time.sleep(0.02)


def variables(size: int, local: int | None = None) -> list[dict[str, str]]:
    """What torchrun tells each of `size` processes. local: how many of them are said to share a machine; default all."""
    local = local or size
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank % local} for rank in range(size)]
    return [{key: str(value) for key, value in one.items()} for one in ranks]


def _become(own: dict[str, str], errors: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """In the new process: its variables and its stderr, and then the work."""
    import torch

    for key in [key for key in os.environ if key.startswith(("TORCHELASTIC_", "MASTER_"))]:
        del os.environ[key]
    # No GPU: two of these processes may not share one.
    os.environ.update(own, CUDA_VISIBLE_DEVICES="")
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    work(*arguments)


@contextmanager
def started(ranks: list[dict[str, str]], work: Callable[..., None], *arguments: Any) -> Iterator[Ranks]:
    """`work(*arguments)` once for each set of variables; processes that are still there at the end are killed."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / f"{rank}.err" for rank in range(len(ranks))]
        found = [
            _FORKS.Process(target=_become, args=(own, place, work, arguments))
            for own, place in zip(ranks, places, strict=True)
        ]
        for process in found:
            process.start()
        try:
            yield Ranks(found, Path(folder))
        finally:
            for process in found:
                process.kill()
                process.join()


def run(ranks: list[dict[str, str]], work: Callable[..., None], *arguments: Any, seconds: float = 60) -> list[Ended]:
    """Starts processes and waits for their ends."""
    with started(ranks, work, *arguments) as processes:
        return processes.wait(seconds=seconds)


def done(ranks: list[dict[str, str]], work: Callable[..., None], *arguments: Any, seconds: float = 60) -> None:
    """As `run`, of processes that must end well."""
    for rank, ended in enumerate(run(ranks, work, *arguments, seconds=seconds)):
        assert ended.code == 0, f"rank {rank}: {ended.said}"


def lbllm(*arguments: str) -> None:
    """The command line, in a process of its own."""
    from lbllm_cli.__main__ import main

    sys.argv = ["lbllm", *arguments]
    main()
