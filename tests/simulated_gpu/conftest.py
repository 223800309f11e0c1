"""The simulated device for tests: one process that has it, each command in a child of that."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from simulated_gpu import build

RUN = Path(__file__).with_name("run.py")


@dataclass(frozen=True)
class Outcome:
    """Of one command. broken: rules of this project that it broke, [line of the package, rule, times]. met: steps and pieces.

    syncs: waits for the device, by line and kind. operators: of the package's own, those that ran. peak: bytes on the device.
    """

    code: int
    stdout: str
    stderr: str
    broken: list[list[Any]]
    syncs: dict[str, float]
    met: dict[str, int]
    operators: list[str]
    peak: int


class Simulated:
    """Runs commands of lbllm, scripts and pieces of Python on the simulated device."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path):
        self.server, self.folder = server, folder

    def __call__(self, *command: object, kernels: str = "off", **options: Any) -> Outcome:
        """lbllm, or with `script=True` a file. kernels: LBLLM_KERNELS. options: of `commands.run`."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        environment = {"LBLLM_KERNELS": kernels}
        request = {"command": [str(word) for word in command], "folder": str(self.folder), "environment": environment, **options}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        output = {name: (self.folder / name).read_text() for name in ("stdout", "stderr")}
        assert answer, f"{command} ended the process:\n{output['stderr']}"
        return Outcome(**json.loads(answer), **output)

    def ok(self, *command: object, **options: Any) -> Outcome:
        """The same, expecting exit code 0."""
        found = self(*command, **options)
        assert found.code == 0, found.stderr
        return found

    def python(self, text: str, **options: Any) -> Outcome:
        """Runs a piece of Python, for which `device` is the device and `regions` where the program is."""
        script = self.folder / "piece.py"
        script.write_text(f"import torch\n{text}\n", encoding="utf-8")
        return self(script, script=True, **options)


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulated]:
    """See `Simulated`."""
    if build.compiler() is None:
        pytest.skip("no C++ compiler for the guard")
    folder = tmp_path_factory.mktemp("simulated")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, RUN, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        yield Simulated(server, folder)
        assert server.stdin is not None
        server.stdin.close()
