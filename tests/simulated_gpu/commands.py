"""Commands of lbllm on the simulated device of this process, or each in a child of it; see run.py."""

import argparse
import importlib
import json
import os
import runpy
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from simulated_gpu.children import forked
from simulated_gpu.install import Installed, install

BROKEN = 70
# What commands import, as far as it takes long.
_IMPORTS = (
    *(f"lbllm_cli.{package}.stage" for package in ("ptq", "distill", "act_calib", "end_to_end")), "lbllm_cli.pipeline.runner",
    "lbllm_cli.evaluation.run", "lbllm_cli.export.writer", "lbllm_cli.hf", "transformers.models.llama.modeling_llama",
)  # fmt: skip


def _arguments(text: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stop", metavar="step:N", help="SIGTERM after N of `step` or `piece`")
    parser.add_argument("--script", action="store_true", help="the first word of the command is a file of Python")
    parser.add_argument("--tables", action="store_true", help="knee tables are given")
    parser.add_argument("--serve", action="store_true", help="runs what stdin asks for, each in a child of this process")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args()


def _run(installed: Installed, command: list[str], script: bool) -> int:
    sys.argv = command if script else ["lbllm", *command]
    try:
        if script:
            device, regions = installed
            runpy.run_path(command[0], {"device": device, "regions": regions}, "__main__")
        else:
            from lbllm_cli.__main__ import main

            main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        # As Python does at its end.
        traceback.print_exc()
        return 1
    return 0


def run(
    installed: Installed, command: list[str], script: bool = False, stop: str | None = None, tables: bool = False
) -> dict[str, Any]:
    """Runs a command in this process: its exit code, the rules that it broke, and what was counted."""
    device, regions = installed
    kind, _, count = (stop or "").partition(":")
    regions.stop = (kind, int(count)) if count else None
    if tables:
        from conftest import give_tables

        give_tables(pytest.MonkeyPatch())
    with device.accounts.within("run"):
        code = _run(installed, command, script)
    device.timeline.wait_for_all()
    syncs: dict[str, float] = {}
    for (_, where), row in sorted(device.accounts.rows.items()):
        syncs |= {f"{where}: {kind}": times for kind, times in row.syncs.items()}
    broken = [[where, rule, times] for (rule, where), times in sorted(device.rules.broken.items())]
    return {
        "code": code, "broken": broken, "syncs": syncs, "met": dict(regions.count), "operators": sorted(device.operators),
        "peak": device.memory.peak,
    }  # fmt: skip


def _answered(installed: Installed, request: dict[str, Any]) -> dict[str, Any]:
    """In a child: a request's output goes into files of its folder."""
    folder = Path(request.pop("folder"))
    os.environ.update(request.pop("environment", {}))
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    return run(installed, **request)


def serve() -> None:
    """Answers requests on stdin with lines on stdout, until stdin ends.

    A request: arguments of `run`, `folder` for the files stdout and stderr, and `environment`. The answer: what `run` gives.
    """
    installed = install()
    for module in _IMPORTS:
        importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(forked(partial(_answered, installed, json.loads(line)))), flush=True)


def main(text: str | None) -> int:
    """Runs what the command line says, reports. text: of the help."""
    arguments = _arguments(text)
    if arguments.serve:
        serve()
        return 0
    found = run(install(), arguments.command, arguments.script, arguments.stop, arguments.tables)
    for where, rule, times in found["broken"]:
        print(f"simulated device: {where}: {rule} ({times} times)", file=sys.stderr)
    return BROKEN if found["broken"] and not found["code"] else int(found["code"])
