#!/usr/bin/env python3
"""Commands of lbllm, or a script, on the simulated device: exit code 70 where a rule was broken that CUDA itself does not have.

    python tests/simulated_gpu/run.py ptq --recipe recipe.yaml
    python tests/simulated_gpu/run.py --stop step:3 distill --recipe recipe.yaml
    python tests/simulated_gpu/run.py --script some.py ARGUMENTS
    python tests/simulated_gpu/run.py --serve          requests on stdin, one JSON object a line, see `serve`

The recipe says `runtime.device: cuda`. --stop: SIGTERM comes after so many training steps, or pieces of hidden states. --tables:
knee tables of 4 bits are given, not searched for.
"""

import argparse
import importlib
import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

from pytest import MonkeyPatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulated_gpu import build

build.preload()

from simulated_gpu.children import forked
from simulated_gpu.install import Installed, install

BROKEN = 70
# What commands import, as far as it takes long.
_IMPORTS = ("lbllm_cli.pipeline.runner", "lbllm_cli.hf", "lbllm_cli.end_to_end.stage", "lbllm_cli.ptq.stage", "lbllm_cli.distill.stage",
            "lbllm_cli.act_calib.stage", "lbllm_cli.evaluation.run", "lbllm_cli.export.writer", "transformers.models.llama.modeling_llama")  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stop", metavar="step:N", help="SIGTERM after N of `step` or `piece`")
    parser.add_argument("--script", action="store_true", help="the first word of the command is a file of Python")
    parser.add_argument("--tables", action="store_true", help="knee tables are given")
    parser.add_argument("--serve", action="store_true", help="runs what stdin asks for, each in a child of this process")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args()


def _run(command: list[str], script: bool) -> int:
    sys.argv = command if script else ["lbllm", *command]
    try:
        if script:
            runpy.run_path(command[0], run_name="__main__")
        else:
            from lbllm_cli.__main__ import main

            main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
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

        give_tables(MonkeyPatch())
    with device.accounts.within("run"):
        code = _run(command, script)
    device.timeline.wait_for_all()
    syncs: dict[str, float] = {}
    for (_, where), row in sorted(device.accounts.rows.items()):
        syncs |= {f"{where}: {kind}": times for kind, times in row.syncs.items()}
    operators = {name for row in device.accounts.rows.values() for name in row.operators if name.startswith("lbllm.")}
    broken = [[where, rule, times] for (rule, where), times in sorted(device.rules.broken.items())]
    return {
        "code": code, "broken": broken, "syncs": syncs, "met": dict(regions.count), "operators": sorted(operators),
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


def main() -> int:
    """Runs, reports."""
    arguments = _arguments()
    if arguments.serve:
        serve()
        return 0
    found = run(install(), arguments.command, arguments.script, arguments.stop, arguments.tables)
    for where, rule, times in found["broken"]:
        print(f"simulated device: {where}: {rule} ({times} times)", file=sys.stderr)
    return BROKEN if found["broken"] and not found["code"] else int(found["code"])


if __name__ == "__main__":
    sys.exit(main())
