"""A process that has everything imported and forks one child per command line: a case costs what the command does, not imports.

Run as a program it is the server; `Server` is its client. Both speak one line of JSON per command.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Seconds of a processor, and bytes beyond the server's own memory, that a command may take on a toy.
SECONDS = 20
MEMORY = 1 << 30
_START = 0
# Address space beyond the server's: what asks for more fails by itself, before the machine runs out of memory.
_ADDRESSES = 3 << 30
# Beside all of lbllm_cli.
_PRELOADED = (
    "datasets", "pyarrow.parquet", "jinja2", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What became of a command. code: exit code, negative a signal. memory: bytes beyond the server's. late: had to be killed.

    operations: changes of files that it was about to make, see `_count`.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    memory: int
    late: bool
    operations: int


@dataclass(frozen=True)
class Kill:
    """Sends `signum` after so many seconds, or before the n-th change of a file."""

    signum: int
    seconds: float | None = None
    operation: int | None = None


class Server:
    """A running server; `folder` holds what libraries keep in the home of a user."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        places = {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "MPLCONFIGDIR": str(folder / "mpl")}
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **one, **places, **quiet}
        )
        assert self._answer() == {"ready": True}

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server has died"
        return json.loads(line)

    def run(
        self, arguments: list[str], folder: Path, stdin: str = "", env: dict[str, str] | None = None, kill: Kill | None = None
    ):
        """`lbllm ARGUMENTS` in `folder`/work, HOME and TMPDIR beside it."""
        assert self._process.stdin is not None
        request = {
            "arguments": arguments,
            "folder": str(folder),
            "stdin": stdin,
            "env": env or {},
            "kill": kill and kill.__dict__,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        texts = ((folder / name).read_bytes().decode("utf-8", "replace") for name in ("stdout", "stderr"))
        return Result(answer["code"], *texts, answer["seconds"], answer["memory"], answer["late"], answer["operations"])

    def close(self) -> None:
        """Ends the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _resident() -> tuple[int, int]:
    """Address space and resident memory of this process, bytes."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(pages[0]) * os.sysconf("SC_PAGESIZE"), int(pages[1]) * os.sysconf("SC_PAGESIZE")


def _count(counter: int, kill: dict[str, Any] | None, folder: str) -> None:
    """Counts what Python is about to change in the folder, in the file open as `counter`, and dies before the n-th change."""
    changing = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime", "shutil.rmtree", "shutil.copyfile"}
    done = 0

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open":
            written = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            written = event in changing
        # Paths below the working folder may be relative: only a path elsewhere is told by its beginning.
        if not written or str(arguments[0]).startswith(("/dev", "/proc", folder + "/std")):
            return
        if kill is not None and done == kill["operation"]:
            os.kill(os.getpid(), kill["signum"])
        done += 1
        os.pwrite(counter, str(done).encode(), 0)

    sys.addaudithook(note)


def _child(request: dict[str, Any], counter: int) -> None:
    """The command itself; does not return."""
    import resource
    import tempfile
    import threading
    import traceback

    from lbllm_cli.__main__ import main

    folder = Path(request["folder"])
    os.setsid()
    for number, name, flags in ((1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY), (0, "stdin", os.O_RDONLY)):
        os.dup2(os.open(folder / name, flags), number)
    os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), **request["env"]}
    tempfile.tempdir = None
    os.chdir(folder / "work")
    limit = _resident()[0] + _ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in ("stdin", "stdout", "stderr"):
        before = getattr(sys, name)
        setattr(sys, name, os.fdopen(before.fileno(), before.mode, encoding="utf-8", closefd=False))
    sys.argv = ["lbllm", *request["arguments"]]
    code = 0
    try:
        _count(counter, request["kill"], request["folder"])
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # A thread that goes on would keep a real process alive.
    threading._shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _ends(handle: int, child: int) -> bool:
    """Waits for a command; False where it has used its seconds of a processor, or waits for something itself.

    Not by the clock alone: on a machine with other work a command takes several times as long.
    """
    if select.select([handle], [], [], SECONDS / 2)[0]:
        return True
    before = 0.0
    while not select.select([handle], [], [], SECONDS / 4)[0]:
        fields = Path(f"/proc/{child}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        used = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
        if used > SECONDS or used - before < 0.02:
            return False
        before = used
    return True


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Forks, waits, and answers with what became of it."""
    folder = Path(request["folder"])
    for name in ("stdout", "stderr"):
        (folder / name).write_bytes(b"")
    (folder / "stdin").write_text(request["stdin"], encoding="utf-8")
    counter = os.memfd_create("counter")
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(request, counter)
    handle, kill, late = os.pidfd_open(child), request["kill"], False
    if kill is not None and kill["seconds"] is not None and not select.select([handle], [], [], kill["seconds"])[0]:
        os.kill(child, kill["signum"])
    if not _ends(handle, child):
        late = True
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    seconds = time.monotonic() - began
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # whatever it has started and left behind
    operations = int(os.pread(counter, 20, 0) or b"0")
    os.close(handle)
    os.close(counter)
    facts = {"seconds": seconds, "memory": used.ru_maxrss * 1024 - _START, "late": late, "operations": operations}
    return {"code": os.waitstatus_to_exitcode(status), **facts}


def _idle() -> int:
    """Memory of a child that does nothing, bytes: less than the server's, of whose mapped files it has touched none."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    return os.wait4(child, 0)[2].ru_maxrss * 1024


def _serve() -> None:
    global _START
    import importlib

    from typer.testing import CliRunner

    import lbllm_cli
    from lbllm_cli.cli.app import app

    os.environ.pop("LBLLM_KERNELS", None)
    CliRunner().invoke(app, ["config", "--help"])  # what libraries read at their import is set by every command
    root = Path(lbllm_cli.__file__).parents[1]
    files = [path.relative_to(root).with_suffix("") for path in (root / "lbllm_cli").rglob("*.py") if path.stem != "__init__"]
    # What vLLM imports, where it is installed.
    files = [path for path in files if path.parts[1] != "vllm"]
    modules = [".".join(path.parts) for path in files]
    for name in (*modules, *_PRELOADED):
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    _START = _idle()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
