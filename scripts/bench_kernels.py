#!/usr/bin/env python3
"""The CPU kernels against torch and against the memory: single linears, whole models, and where a decode step's time goes.

    python scripts/bench_kernels.py --out kernels.json
    python scripts/bench_kernels.py --out kernels.json --only model floor --model runs/demo/export --base models/smollm2-135m
    python scripts/bench_kernels.py --out kernels.json --only model floor --random llama-3.2-1b

linear: one packed linear per shape, group size, granularity of the input's step and tier, beside torch's F.linear and beside
plain reading of memory. Weights are cold: each candidate has copies of its own, together three times the last-level cache, and
walks over them. GB/s count the checkpoint's codes, levels and scales without padding. Inputs are bfloat16, as in a model.
quantizer: the activation quantizer in training, values and gradients, by every tier and in torch.
model: a packed folder, or random packed weights of a known architecture, against the same architecture dense in bfloat16;
and the memory of loading it in a fresh process. floor: a decode step with its blocks or its head taken out, and the time that
reading its weights takes at the bandwidth of the same run; what the 4-bit cache adds is not counted.

All candidates of a case run in every round, in turn, so that whatever else the machine does meets all of them; figures are
medians of rounds. On a busy machine long calls still lose more than short ones: the ratios want it idle. With --out a case
that the file has is not measured again. Needs an lbllm with compiled kernels.
"""

import argparse
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from kernel_harness import Bench, Record, Results, last_level_cache, machine_facts
from kernel_linears import measure_linear
from kernel_models import MODELS, WORK, Subject, measure_floor, measure_memory, measure_model
from kernel_quantizer import measure_quantizer
from rich.console import Console
from rich.table import Table

import lbllm_cli.hf  # noqa: F401  registers the packed format
from lbllm_cli.engine.abi import ROW_GROUP, TIERS, library

SECTIONS = ("linear", "quantizer", "model", "floor")
ALONE = SECTIONS[:2]  # those that need no model
# in:out. The last three are SmolLM2-135M's units: q, k and v below each other, gate and up, down.
LINEAR_SHAPES = ("4096:4096", "11008:4096", "576:960", "576:3072", "1536:576")
# Channels of SmolLM2-135M's inputs, and tokens of a training step.
WIDTHS, TOKENS = (576, 1536), 512


def show(title: str, columns: str, rows: list[list[Any]]) -> None:
    """A table on stdout; no number has more digits than mean something."""
    table = Table(*columns.split(","), title=title)
    for row in rows:
        table.add_row(*(f"{x:.{0 if x >= 100 else 2}f}" if isinstance(x, float) else str(x) for x in row))
    if rows:
        Console(width=None if sys.stdout.isatty() else 130).print(table)


def show_all(records: dict[str, Record]) -> None:
    """All records as tables."""
    found = {section: list(records.get(section, {}).items()) for section in (*SECTIONS, "memory")}
    columns = "in:out,rows,threads,tier,group,step per,us,GB/s,of reading,x bf16,x fp32"
    rows = [[*case.split(), *kernel.values()] for case, record in found["linear"] for kernel in record["kernels"]]
    show("linear", columns, rows)
    others = [[*case.split(), record["read_gb_s"], *record["torch_us"].values()] for case, record in found["linear"]]
    show("linear: torch and reading", "in:out,rows,threads,reading GB/s,bf16 us,fp32 us", others)
    rows = []
    for case, record in found["quantizer"]:
        ways = {tier: (own["forward"], own["backward"]) for tier, own in record.items() if tier != "rounds"}
        rows += [[*case.split(), tier, *(value for way in own for value in way.values())] for tier, own in ways.items()]
    show("quantizer in training", "channels,tokens,group,threads,tier,forward ms,x torch,backward ms,x torch", rows)
    rows = []
    for case, record in found["model"]:
        speeds = record["tokens_per_second"]
        rows += [[case, work, speeds["packed"][work], speeds["dense"][work], record["ratio"][work]] for work in WORK]
    show("model: tokens per second", "model,work,packed,dense bf16,ratio", rows)
    sizes = ("files_bytes", "imports_bytes", "loaded_bytes", "peak_bytes")
    rows = [[case, *(r[name] / (1 << 20) for name in sizes), r["peak_ratio"]] for case, r in found["memory"]]
    show("memory of loading, MiB", "model,files,imports,loaded,peak,peak / (files + imports)", rows)
    rows = [[case, *r["tokens_per_second"].values(), r["times_floor"]] for case, r in found["floor"]]
    show("floor: tokens per second", "model,whole,no blocks,no head,neither,reading weights,reading / whole", rows)


def read_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, help="sections; default linear and quantizer, and all with a model"
    )
    parser.add_argument("--out", type=Path, help="JSON file to begin or to go on with")
    parser.add_argument("--force", action="store_true", help="measure what the file has already, too")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, after one that is not")
    parser.add_argument("--shapes", nargs="+", default=LINEAR_SHAPES, metavar="IN:OUT")
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--table-groups", type=int, nargs="*", default=[16], help="groups whose levels have 2 bits")
    parser.add_argument("--step", type=int, default=ROW_GROUP, help="inputs that share a step there (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 128], help="tokens that a linear gets")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=TIERS, help="those that this CPU lacks are left out")
    parser.add_argument("--cache-mib", type=int, help="last-level cache; default what the system says")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="packed folder; needs --base for the model section")
    which.add_argument("--random", choices=MODELS, help="random packed weights of this architecture")
    parser.add_argument("--base", type=Path, help="dense folder that --model was made from")
    arguments = parser.parse_args()
    whole = arguments.model or arguments.random
    arguments.only = arguments.only or (SECTIONS if whole else ALONE)
    if not whole and not set(arguments.only) <= set(ALONE):
        parser.error("the sections model and floor need --model or --random")
    if "model" in arguments.only and arguments.model and not arguments.base:
        parser.error("--model needs --base, which it is measured against")
    if min(arguments.rounds, *arguments.threads, *arguments.rows) < 1:
        parser.error("--threads, --rounds and --rows: at least 1")
    return arguments


def main() -> None:
    """Measures what is missing and prints all of it."""
    transformers.logging.disable_progress_bar()
    arguments, lib = read_arguments(), library()
    if lib is None:
        raise SystemExit("no compiled kernels here: there is nothing to measure")
    cache = arguments.cache_mib << 20 if arguments.cache_mib else last_level_cache()
    results = Results(arguments.out, arguments.force, machine_facts(lib, cache))
    bench = Bench(arguments, lib, cache)
    torch.manual_seed(0)
    if "linear" in arguments.only:
        for shape, rows, threads in product(arguments.shapes, arguments.rows, arguments.threads):
            inputs, outputs = map(int, shape.split(":"))
            work = partial(measure_linear, bench, inputs, outputs, rows, threads)
            results.measure("linear", f"{shape} {rows} {threads}", work)
    if "quantizer" in arguments.only:
        for width, group_size, threads in product(WIDTHS, arguments.groups, arguments.threads):
            work = partial(measure_quantizer, bench, width, TOKENS, group_size, threads)
            results.measure("quantizer", f"{width} {TOKENS} {group_size} {threads}", work)
    with tempfile.TemporaryDirectory() as scratch:
        subject = Subject(arguments, Path(scratch))
        for section, measure in (("model", measure_model), ("floor", measure_floor)):
            for threads in arguments.threads if section in arguments.only else ():
                results.measure(section, f"{subject.name}, {threads} threads", partial(measure, bench, subject, threads))
        if "model" in arguments.only:
            results.measure("memory", subject.name, partial(measure_memory, subject))
    print(results.records["machine"])
    show_all(results.records)


if __name__ == "__main__":
    main()
