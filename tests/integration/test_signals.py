"""SIGINT and SIGTERM at any moment: exit code 130 and one line, in commands that keep nothing as well."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def waits_for(child: subprocess.Popen, signum: int) -> None:
    """Until the process has a handler for the signal: before that it is Python that starts."""
    while child.poll() is None:
        caught = Path(f"/proc/{child.pid}/status").read_text().split("SigCgt:")[1].split()[0]
        if int(caught, 16) >> (signum - 1) & 1:
            return
        time.sleep(0.002)
    pytest.fail(f"ended with {child.returncode}: {child.stderr.read()}")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("command", "seconds", "signum"),
    [
        ("report", 0.0, signal.SIGTERM),
        ("ptq", 0.1, signal.SIGTERM),
        ("validate", 0.5, signal.SIGTERM),
        ("report", 0.3, signal.SIGINT),
        ("generate", 0.8, signal.SIGTERM),
    ],
)
def test_a_signal_while_a_command_starts(tmp_path, toy, recipe, command, seconds, signum):
    options = ["--model", toy, "--prompt", "x", "--max-new-tokens", "100"] if command == "generate" else ["--recipe", recipe]
    arguments = [sys.executable, "-m", "lbllm_cli", command, *map(str, options)]
    # Where a shell has put the tests into the background, they ignore SIGINT, and so would the command.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, cwd=tmp_path, preexec_fn=heard, **pipes) as child:
        waits_for(child, signal.SIGTERM)
        time.sleep(seconds)
        os.kill(child.pid, signum)
        _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130
    assert stderr == "lbllm: interrupted; run the same command again to resume\n"


def test_a_signal_that_is_ignored_stays_ignored(tmp_path, recipe):
    """As of a job that a shell has put into the background."""
    arguments = [sys.executable, "-m", "lbllm_cli", "config", "--recipe", str(recipe)]
    ignoring = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ignoring) as child:
        waits_for(child, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
        stdout, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert "group_size: 32" in stdout


def test_a_signal_after_the_end_changes_nothing(tmp_path):
    """In the time that Python takes to take itself apart."""
    late = "atexit.register(lambda: [os.kill(os.getpid(), n) for n in (signal.SIGINT, signal.SIGTERM)])"
    command = "from lbllm_cli.__main__ import main\nsys.argv = ['lbllm', '--version']\nmain()"
    code = f"import atexit, os, signal, sys\n{late}\n{command}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
