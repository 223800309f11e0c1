#!/usr/bin/env python3
"""Whether two commits write the same bytes: every file of short runs by its hash, and a comparison of two such lists.

    python scripts/same_bytes.py record before.json --commit main
    python scripts/same_bytes.py record after.json
    python scripts/same_bytes.py compare before.json after.json

Without --commit the package of this environment runs, else that commit's code, with its own CPU kernels. Bytes hold for one
machine and one torch: both lists must come from the same. Every run has one thread. The toy's runs take minutes; those of
SmolLM2-135M need its model (make models/smollm2-135m/config.json).
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "models/smollm2-135m"

# What a run writes without clocks and without facts about the machine.
WRITTEN = ("*.safetensors", "*.index.json", "lbllm_stage.json", "lbllm_export.json", "config.json", "README.md")
RESOLVED = "recipe.resolved.yaml"

# Code of another folder than the one that this environment's editable install points to.
FROM_FOLDER = """
import runpy, sys
source, sys.argv = sys.argv[1], ["lbllm", *sys.argv[2:]]
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, source)
import lbllm_cli
assert lbllm_cli.__file__.startswith(source + "/"), f"{lbllm_cli.__file__} is not in {source}"
runpy.run_module("lbllm_cli", run_name="__main__")
"""


@dataclass(frozen=True)
class Run:
    """Commands of one output folder. overrides: of the recipe, for each of them."""

    recipe: str
    overrides: list[str]
    commands: tuple[str, ...]


def _sizes(training: int, calibration: int, last: int) -> list[str]:
    """Overrides for so many sequences of 128 tokens, of the end-to-end phases too, and one epoch."""
    return [
        f"data.training.sequences={training}", f"data.calibration.sequences={calibration}",
        "data.training.length=128", "data.calibration.length=128", "distill.epochs=1", "act_calib.epochs=1",
        f"distill.end_to_end.sequences={last}", f"act_calib.end_to_end.sequences={last}",
    ]  # fmt: skip


ALL = ("ptq", "distill", "act-calib", "packed", "dense")
BITMAP = ["distill.parametrisation=bitmap", "runtime.streams=disk"]
RUNS = {
    "toy": Run("recipes/toy.yaml", _sizes(16, 8, 8), ALL),
    "toy-bitmap-disk": Run("recipes/toy.yaml", [*_sizes(16, 8, 8), *BITMAP], ("ptq", "distill")),
    "smollm2": Run("recipes/smollm2-135m.yaml", [*_sizes(4, 4, 4), f"model.path={SMOLLM2}"], ALL),
}


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A commit's tree with its CPU kernels in its package, deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        tree, build = (Path(folder).resolve() / name for name in ("tree", "build"))
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            quiet = {"check": True, "stdout": subprocess.DEVNULL}
            subprocess.run(["cmake", "-S", tree, "-B", build, "-DCMAKE_BUILD_TYPE=Release"], **quiet)
            subprocess.run(["cmake", "--build", build], **quiet)
            subprocess.run(["cmake", "--install", build, "--prefix", tree / "src"], **quiet)
            yield tree
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


def lbllm(tree: Path, *arguments: str) -> None:
    """The command line of a tree. Its stderr is shown; raises CalledProcessError when it fails."""
    start = ["-m", "lbllm_cli"] if tree == ROOT else ["-c", FROM_FOLDER, str(tree / "src")]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *start, *arguments], check=True, cwd=tree, env=settings)


def write_run(tree: Path, run: Run, output: Path) -> None:
    """Runs all commands of a run. An export is moved aside by its format, for the next one would replace it."""
    for command in run.commands:
        exports = command in ("packed", "dense")
        given = [*run.overrides, f"output.dir={output}", *([f"export.format={command}"] if exports else [])]
        lbllm(tree, "export" if exports else command, "--recipe", str(tree / run.recipe), *given)
        if exports:
            (output / "export").rename(output / f"export-{command}")


def hashes(output: Path, places: dict[str, str]) -> dict[str, str]:
    """Hash of every file that the promise of equal bytes covers, by its path. places: folders and what stands for them."""
    found = {}
    for file in sorted(file for pattern in (*WRITTEN, RESOLVED) for file in output.rglob(pattern)):
        data = file.read_bytes()
        if file.name == RESOLVED:
            for folder, name in places.items():
                data = data.replace(folder.encode(), name.encode())
        found[str(file.relative_to(output))] = hashlib.sha256(data).hexdigest()
    return found


def machine() -> dict[str, str]:
    """What bytes depend on beside the code."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return {"torch": torch.__version__, "cpu_flags": hashlib.sha256(flags.encode()).hexdigest()}


def record(tree: Path, commit: str, names: list[str]) -> dict[str, Any]:
    """The list of a tree: where it was made and the hashes of every run."""
    listed = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "run")
            write_run(tree, RUNS[name], output)
            listed[name] = hashes(output, {str(output): "OUTPUT", str(tree): "ROOT", str(ROOT): "ROOT"})
        print(f"{name}: {len(listed[name])} files")
    return {"commit": commit, "machine": machine(), "runs": listed}


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line per difference of two lists, in what they both have."""
    lines = [f"{key}: {value} -> {after['machine'][key]}: not comparable" for key, value in before["machine"].items()
             if after["machine"][key] != value]  # fmt: skip
    for name in sorted(before["runs"].keys() & after["runs"].keys()):
        old, new = before["runs"][name], after["runs"][name]
        lines += [f"{name}/{file}: only in the first" for file in sorted(old.keys() - new.keys())]
        lines += [f"{name}/{file}: only in the second" for file in sorted(new.keys() - old.keys())]
        lines += [f"{name}/{file}: differs" for file in sorted(old.keys() & new.keys()) if old[file] != new[file]]
    return lines


def main() -> int:
    """The command line: 0 where nothing differs."""
    parser = argparse.ArgumentParser(description="Compare what two commits write, file by file.")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run and write the list of hashes")
    recording.add_argument("list", type=Path, metavar="LIST.json")
    recording.add_argument("--commit", help="code to run; default this environment's")
    recording.add_argument("--only", choices=("toy", "smollm2"), help="runs of this model alone")
    comparing = commands.add_parser("compare", help="compare two lists; exit code 1 where they differ")
    comparing.add_argument("lists", type=Path, nargs=2, metavar="LIST.json")
    args = parser.parse_args()
    if args.command == "record":
        names = [name for name in RUNS if args.only is None or name.startswith(args.only)]
        if "smollm2" in names and not (SMOLLM2 / "config.json").exists():
            parser.error(f"{SMOLLM2} is not there; run: make models/smollm2-135m/config.json, or give --only toy")
        if args.commit is None:
            found = record(ROOT, "", names)
        else:
            with checkout(args.commit) as tree:
                found = record(tree, args.commit, names)
        args.list.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return 0
    first, second = (json.loads(file.read_text(encoding="utf-8")) for file in args.lists)
    shared = sorted(first["runs"].keys() & second["runs"].keys())
    if not shared:
        parser.error("the lists have no run in common")
    lines = compare(first, second)
    count = sum(len(first["runs"][name]) for name in shared)
    print("\n".join([*lines, f"{len(lines)} differences in {count} files of {', '.join(shared)}"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
