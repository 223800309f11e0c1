#!/usr/bin/env python3
"""A packed export in the native engine beside the same model in llama.cpp: decode, prompts, start, memory, bytes.

    make .venv-llama/.installed
    lbllm export --recipe recipes/smollm2-135m-2.5-bits.yaml export.format=gguf   # the next export replaces it
    mkdir -p runs/llama && mv runs/smollm2-135m-2.5-bits/export/model.gguf runs/llama/source.gguf
    lbllm export --recipe recipes/smollm2-135m-2.5-bits.yaml
    python scripts/bench/llama.py --packed runs/smollm2-135m-2.5-bits/export --gguf runs/llama/source.gguf --out runs/llama

llama.cpp's other files are made of the GGUF export by its own quantizer, of weights that were rounded before: their speed is that
of any weights. Where rows are no multiple of 256 it takes other types for some of them, of more bits.

Both run in processes of their own and take turns; a ratio is the median of ratios within a round, behind it stand the least and
the most. The table is OUT/table.md, and every measurement is in OUT/rounds.jsonl. Times are wall times: where other programs
keep the cores busy the script refuses, or measures with --cpu-time the CPU time of one thread alone. For models that are not at
hand there is random_export.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

KINDS = ("F16", "Q8_0", "Q4_0", "Q2_K", "TQ2_0")
CONTEXTS, PROMPTS = (16, 512, 1500), (128, 512)
DECODED = 24
VOCABULARY = 30_000
ROOM = 2048


def tokens_of(count: int) -> list[int]:
    """Tokens that no model minds, the same for all."""
    return [7 + 7919 * place % VOCABULARY for place in range(count)]


class Native:
    """The native engine."""

    def __init__(self, path: Path, threads: int):
        from lbllm_cli.engine.model import Model, Session

        self.session = Session(Model(path, threads), ROOM)

    def run(self, tokens: list[int]) -> int:
        """Appends tokens; the likeliest next one."""
        return int(self.session.run(tokens).argmax())

    def keep(self, count: int) -> None:
        """Forgets all but the first tokens."""
        self.session.keep(count)


class LlamaCpp:
    """llama.cpp by its own functions: what its Python class does between two tokens is not counted."""

    def __init__(self, path: Path, threads: int):
        import llama_cpp
        import numpy

        self.c, self.np = llama_cpp, numpy
        self.model = llama_cpp.Llama(
            str(path), n_ctx=ROOM, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.vocabulary, self.held = self.model.n_vocab(), 0

    def run(self, tokens: list[int]) -> int:
        """Appends tokens; the likeliest next one."""
        context = self.model.ctx
        for start in range(0, len(tokens), 512):
            piece = tokens[start : start + 512]
            array = (self.c.llama_token * len(piece))(*piece)
            if self.c.llama_decode(context, self.c.llama_batch_get_one(array, len(piece))):
                raise RuntimeError("llama_decode failed")
        self.held += len(tokens)
        logits = self.np.ctypeslib.as_array(self.c.llama_get_logits(context), shape=(self.vocabulary,))
        return int(logits.argmax())

    def keep(self, count: int) -> None:
        """Forgets all but the first tokens."""
        self.c.llama_memory_seq_rm(self.c.llama_get_memory(self.model.ctx), 0, count, -1)
        self.held = count


def clock(cpu: bool) -> float:
    """Seconds: of this thread's CPU, or of the wall."""
    return time.thread_time() if cpu else time.perf_counter()


def measure(engine: Any, what: str, count: int, cpu: bool) -> float:
    """Seconds for a prompt of `count` tokens, or for a token behind `count` others."""
    if what == "prompt":
        engine.keep(0)
        start = clock(cpu)
        engine.run(tokens_of(count))
        return clock(cpu) - start
    engine.keep(0)
    token = engine.run(tokens_of(count))
    times = []
    for _ in range(DECODED):
        start = clock(cpu)
        token = engine.run([token])
        times.append(clock(cpu) - start)
    return statistics.median(times)


def work(args: argparse.Namespace) -> None:
    """A process of one engine: does what each line of the input says, and answers with a line."""
    engine = (Native if args.path.is_dir() else LlamaCpp)(args.path, args.threads)
    if args.first:
        engine.run(tokens_of(16))
        return
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        what, count = json.loads(line)
        print(json.dumps(measure(engine, what, count, args.cpu_time)), flush=True)


def make_files(source: Path, out: Path, python: str, kinds: list[str]) -> dict[str, Path]:
    """llama.cpp's files by kind, made once."""
    found = {}
    with source.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()[:12]
    for kind in kinds:
        # By its source: of another one it is another file.
        path = found[kind] = out / f"{kind}-{digest}.gguf"
        if path.exists():
            continue
        code = (
            "import sys, llama_cpp as c\n"
            "p = c.llama_model_quantize_default_params()\n"
            f"p.ftype, p.allow_requantize = c.LLAMA_FTYPE_MOSTLY_{kind}, True\n"
            "sys.exit(c.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
        )
        partial = path.with_suffix(".partial")
        subprocess.run([python, "-c", code, str(source), str(partial)], check=True, stderr=subprocess.DEVNULL)
        partial.rename(path)
    return found


class Process:
    """An engine in a process of its own."""

    def __init__(self, python: str, path: Path, threads: int, cpu: bool):
        command = [python, __file__, "work", str(path), "--threads", str(threads), *(["--cpu-time"] if cpu else [])]
        settings = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings)
        self._answer()

    def _answer(self) -> Any:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            sys.exit(f"{self.child.args} ended")
        return json.loads(line)

    def ask(self, what: str, count: int) -> float:
        """Seconds, as `measure`."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps([what, count]) + "\n")
        self.child.stdin.flush()
        return float(self._answer())

    def memory(self) -> float:
        """MiB that have been resident at once."""
        status = Path(f"/proc/{self.child.pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def end(self) -> None:
        """No more questions."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()


def start_seconds(python: str, path: Path, threads: int) -> float:
    """CPU seconds from the start of a process to its first token."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([python, __file__, "work", str(path), "--threads", str(threads), "--first"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def busy_cores() -> float:
    """Cores that other programs keep busy, over two seconds."""

    def ticks() -> tuple[int, int]:
        values = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
        return values[3] + values[4], sum(values[:8])

    before = ticks()
    time.sleep(2)
    idle, whole = (after - first for after, first in zip(ticks(), before, strict=True))
    return (os.cpu_count() or 1) * (1 - idle / whole)


def check_load(threads: int) -> None:
    """Ends the script where other programs leave fewer cores than it wants."""
    cores, busy = os.cpu_count() or 1, busy_cores()
    if busy > cores - threads + 0.2:
        sys.exit(f"{busy:.1f} of {cores} cores are busy: with {threads} threads times mean nothing; wait, or give --cpu-time")


def take_rounds(args: argparse.Namespace, running: dict[str, Process], threads: int) -> list[dict[str, Any]]:
    """Every question to every engine, in turns; each round is written down as it ends."""
    questions = [("token", count) for count in args.contexts] + [("prompt", count) for count in args.prompts]
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for what, count in questions:
            found = {name: process.ask(what, count) for name, process in running.items()}
            rounds.append({"threads": threads, "round": number, "what": f"{what} {count}", **found})
            with (args.out / "rounds.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounds[-1]) + "\n")
    return rounds


def figure(values: list[float], own: list[float]) -> dict[str, float]:
    """Median of an engine's figures; what lbllm's are of them, and the least and the most of that within one round."""
    ratios = [mine / theirs for mine, theirs in zip(own, values, strict=True)]
    return {"value": statistics.median(values), "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def compare(args: argparse.Namespace) -> None:
    """All rounds, and the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    paths = {"lbllm": args.packed, **make_files(args.gguf, args.out, args.python, args.kinds)}
    python = dict.fromkeys(paths, args.python) | {"lbllm": sys.executable}
    rows: dict[str, dict[str, dict[str, float]]] = {name: {} for name in paths}

    def put(what: str, values: dict[str, list[float]]) -> None:
        for name, found in values.items():
            rows[name][what] = figure(found, values["lbllm"])

    if not args.cpu_time:
        check_load(max(args.threads))
    for threads in args.threads:
        running = {name: Process(python[name], path, threads, args.cpu_time) for name, path in paths.items()}
        rounds = take_rounds(args, running, threads)
        for what in dict.fromkeys(found["what"] for found in rounds):
            put(f"{what}, {threads}", {name: [found[name] for found in rounds if found["what"] == what] for name in paths})
        put(f"memory, {threads}", {name: [process.memory()] for name, process in running.items()})
        for process in running.values():
            process.end()
        write_table(rows, args)
    files = {name: [path] if path.is_file() else list(path.glob("*.safetensors")) for name, path in paths.items()}
    put("bytes", {name: [sum(file.stat().st_size for file in found)] for name, found in files.items()})
    put("start", {name: [start_seconds(python[name], path, 1) for _ in range(3)] for name, path in paths.items()})
    write_table(rows, args)
    print(table(rows))


def machine(python: str) -> str:
    """What was compared, and on what. python: that has llama.cpp."""
    code = "import llama_cpp; print(llama_cpp.__version__)"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    processor = names[0] if names else "an unknown processor"
    return f"lbllm {version('lbllm-cli')}, llama-cpp-python {said.stdout.split()[-1]}, {processor}"


def write_table(rows: dict[str, dict[str, dict[str, float]]], args: argparse.Namespace) -> None:
    """What is measured so far."""
    on = machine(args.python)
    (args.out / "table.json").write_text(json.dumps({"machine": on, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    (args.out / "table.md").write_text(f"{table(rows)}\n{on}\n", encoding="utf-8")


def shown(what: str, value: float) -> str:
    """A figure with its unit."""
    if what.startswith("memory"):
        return f"{value:.0f} MiB"
    if what == "bytes":
        return f"{value / 1e6:.1f} MB"
    if what == "start":
        return f"{value:.2f} s"
    return f"{value * 1e3:.2f} ms"


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row for each question; behind each of llama.cpp's figures what lbllm's is of it, and its least and most in one round."""
    lines = [f"| | {' | '.join(rows)} |", "|---|" + "---:|" * len(rows)]
    for what in rows["lbllm"]:
        cells = []
        for name, found in rows.items():
            one = found[what]
            spread = "" if one["least"] == one["most"] else f", {one['least']:.2f} to {one['most']:.2f}"
            cells.append(shown(what, one["value"]) + ("" if name == "lbllm" else f" ({one['ratio']:.2f}x{spread})"))
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The script itself, or a process of one engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if sys.argv[1:2] == ["work"]:
        parser.add_argument("what")
        parser.add_argument("path", type=Path)
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--first", action="store_true")
        parser.add_argument("--cpu-time", action="store_true")
        work(parser.parse_args())
        return
    parser.add_argument("--packed", type=Path, required=True, help="packed export")
    parser.add_argument("--gguf", type=Path, required=True, help="model.gguf of the same model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", default=".venv-llama/bin/python", help="that has llama-cpp-python")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens before the one that is timed")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="tokens of prompts that are timed")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread: for a machine that others use")
    args = parser.parse_args()
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu-time measures one thread: give --threads 1")
    compare(args)


if __name__ == "__main__":
    main()
