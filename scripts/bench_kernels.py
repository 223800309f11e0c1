#!/usr/bin/env python3
"""The CPU kernels against torch and against the memory: single linears, whole models, and where a decode step's time goes.

    python scripts/bench_kernels.py --out kernels.json
    python scripts/bench_kernels.py --out kernels.json --only model floor --model runs/demo/export --base models/smollm2-135m
    python scripts/bench_kernels.py --out kernels.json --only model floor --random llama-3.2-1b

linear: one packed linear per shape, group size, granularity of the input's step and tier, beside torch's F.linear and beside
plain reading of memory. Weights are cold: each candidate has copies of its own, together three times the last-level cache, and
walks over them. GB/s count the checkpoint's codes, levels and scales without padding. Inputs are bfloat16, as in a model.
model: a packed folder, or random packed weights of a known architecture, against the same architecture dense in bfloat16;
and the memory of loading it in a fresh process. floor: a decode step with its blocks or its head taken out, and the time that
reading its weights takes at the bandwidth of the same run; what the 4-bit cache adds is not counted.

All candidates of a case run in every round, in turn, so that whatever else the machine does meets all of them; figures are
medians of rounds. On a busy machine long calls still lose more than short ones: the ratios want it idle. With --out a case
that the file has is not measured again. Needs an lbllm with compiled kernels.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import lbllm_cli.hf  # noqa: F401  registers the packed format
from lbllm_cli import files
from lbllm_cli.activations import ActivationFormat, ActQuantizer, quantizer_widths
from lbllm_cli.kernels.library import DTYPES, TIERS, Weights, library, pointer, quantizer_struct, tier
from lbllm_cli.kernels.unit import Unit, aligned
from lbllm_cli.layers import PackedLinear
from lbllm_cli.model import LINEARS
from lbllm_cli.ops.actfit import Shape, tables_of
from lbllm_cli.ops.binarize import LEVEL_MAX, LEVELS, group_count
from lbllm_cli.stages.export import quantization_config

SECTIONS = ("linear", "model", "floor")
WORK = ("prefill", "decode", "generate")
# Tokens of a prefill, of the prompt before a decode, and decoded.
PREFILL, PROMPT, NEW = 128, 32, 64
# in:out. The last three are SmolLM2-135M's units: q, k and v below each other, gate and up, down.
LINEAR_SHAPES = ("4096:4096", "11008:4096", "576:960", "576:3072", "1536:576")
GRANULARITIES = ("group", "token")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
# SIZES, and the group size. All have tied embeddings.
MODELS = {"tiny": (64, 128, 2, 2, 1, 256, 32), "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, 128)}
# Tables as calibration finds them, with 25 and 55 as the largest places.
TABLES = [Shape(5, 5, 2, 3, 3, 3), Shape(3, 3, 4, 5, 6, 5)]
WEIGHT_RMS = 0.02
CACHE_DEFAULT = 32 << 20
# Bytes of one call that measures the bandwidth.
CHUNK = 12 << 20
# A candidate's walk over its copies ends after this many seconds and goes on in the next round: slow ones would take hours.
PATIENCE = 0.25
LOADING = """
import json, sys
from pathlib import Path
import torch, transformers, lbllm_cli.hf
def status(field):
    return int(Path("/proc/self/status").read_text(encoding="ascii").split(field + ":")[1].split()[0]) * 1024
before = status("VmRSS")
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(json.dumps({"imports_bytes": before, "loaded_bytes": status("VmRSS"), "peak_bytes": status("VmHWM")}))
"""

Record = dict[str, Any]


class Results:
    """Records by section and case, in a file that is written after every case."""

    def __init__(self, path: Path | None, force: bool, machine: Record):
        self.path, self.force = path, force
        self.records: dict[str, Record] = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
        if self.records.setdefault("machine", machine) != machine:
            raise SystemExit(f"{path} is of another machine or other versions: {self.records['machine']}; choose another --out")

    def measure(self, section: str, case: str, work: Callable[[], Record]) -> None:
        """Runs `work` unless its record is there already."""
        records = self.records.setdefault(section, {})
        if case in records and not self.force:
            return
        print(f"{section} {case}", file=sys.stderr)
        records[case] = work()
        if self.path:
            files.write_json(self.path, self.records)


def machine_facts(lib: Any, cache: int) -> Record:
    """What figures depend on beside the code."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "cache_bytes": cache, "tier": tier(lib), **versions}


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core sees."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text(encoding="ascii").strip()[:-1]) << 10 for path in sizes), default=CACHE_DEFAULT)


def medians(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """What each candidate returns, median over rounds after one that warms up; who begins changes from round to round."""
    names = list(candidates)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = candidates[name]()
            if turn:
                taken[name].append(seconds)
    return {name: median(own) for name, own in taken.items()}


class Walk:
    """One call per copy of the weights; calling it returns the median seconds of a round's calls.

    kept: tensors of which the calls have the addresses alone.
    """

    def __init__(self, calls: list[Callable[[], Any]], lib: Any, in_tier: str, *kept: Tensor):
        self.calls, self.lib, self.tier, self.at, self.kept = calls, lib, in_tier.encode(), 0, kept

    def __call__(self) -> float:
        self.lib.lbllm_choose_tier(self.tier)
        taken: list[float] = []
        while len(taken) < len(self.calls) and sum(taken) < PATIENCE:
            call = self.calls[self.at]
            began = perf_counter()
            call()
            taken.append(perf_counter() - began)
            self.at = (self.at + 1) % len(self.calls)
        return median(taken)


class Bench:
    """What all sections share. buffer: more bytes than the cache holds, for the bandwidth."""

    def __init__(self, arguments: argparse.Namespace, lib: Any, cache: int):
        self.arguments, self.lib, self.cold = arguments, lib, 3 * cache
        self.best = tier(lib)
        self.tiers = [name for name in arguments.tiers if lib.lbllm_choose_tier(name.encode()) == 0]
        lib.lbllm_choose_tier(self.best.encode())
        self.buffer = torch.ones(self.copies(CHUNK), CHUNK, dtype=torch.uint8)

    def reading(self, threads: int) -> Walk:
        """Reads the buffer, CHUNK bytes in a call: one long call would be interrupted more often than a kernel's."""
        calls = [partial(self.lib.lbllm_read, pointer(part), CHUNK, threads) for part in self.buffer]
        return Walk(calls, self.lib, self.best)

    def copies(self, size: int) -> int:
        """Copies of `size` bytes that the cache cannot hold; never one alone."""
        return max(2, -(-self.cold // size))


def random_packed(inputs: int, outputs: int, group_size: int) -> dict[str, Tensor]:
    """Random tensors of a packed linear, with weights of the usual size."""
    groups = group_count(inputs, group_size)
    return {
        "weight": torch.randint(256, (outputs, groups, group_size // 4), dtype=torch.uint8),
        "levels": torch.randint(-LEVEL_MAX, LEVEL_MAX + 1, (outputs, groups, LEVELS), dtype=torch.int8),
        "scale": torch.full((outputs, groups), WEIGHT_RMS * 3**0.5 / LEVEL_MAX, dtype=torch.float16),
    }


def stored_bytes(inputs: int, outputs: int, group_size: int) -> float:
    """Codes, int8 levels and float16 scales of a linear, without padding."""
    return outputs * (inputs / 4 + group_count(inputs, group_size) * (LEVELS + 2))


def packed_walks(bench: Bench, inputs: int, outputs: int, x: Tensor, threads: int) -> dict[tuple[str, int, str], Walk]:
    """A walk for each tier, group size and granularity; granularities and tiers share the copies of the weights."""
    walks, y = {}, x.new_empty(len(x), outputs)
    for group_size in bench.arguments.groups:
        packed = PackedLinear(inputs, outputs, group_size, False)
        packed.load_state_dict(random_packed(inputs, outputs, group_size))
        tiles = Unit([packed], ActQuantizer(tables_of(TABLES), group_size)).tiles
        stride = -(-len(tiles) // 64) * 64
        count = bench.copies(len(tiles))
        room = aligned(count * stride).view(count, stride)
        room[:, : len(tiles)] = tiles
        weights = [Weights(pointer(row), None, inputs, outputs, group_size) for row in room]
        for granularity in GRANULARITIES:
            quantizer = quantizer_struct(ActQuantizer(tables_of(TABLES), group_size if granularity == "group" else inputs))
            common = (byref(quantizer), pointer(x), pointer(y), DTYPES[x.dtype], len(x), threads)
            for name in bench.tiers:
                calls = [partial(bench.lib.lbllm_linear, byref(w), *common) for w in weights]
                walks[name, group_size, granularity] = Walk(calls, bench.lib, name, room, x, y)
    return walks


def dense_walk(bench: Bench, outputs: int, x: Tensor) -> Walk:
    """torch's product with dense weights in the dtype of x."""
    weight = torch.randn(outputs, x.shape[1]).mul_(WEIGHT_RMS).to(x.dtype)
    copies = [weight.clone() for _ in range(bench.copies(weight.nbytes))]
    return Walk([partial(dense_linear, x, copy) for copy in copies], bench.lib, bench.best)


def measure_linear(bench: Bench, inputs: int, outputs: int, rows: int, threads: int) -> Record:
    """One shape: every kernel, torch in both dtypes, reading."""
    torch.set_num_threads(threads)
    x = torch.randn(rows, inputs)
    walks: dict[Any, Walk] = packed_walks(bench, inputs, outputs, x.bfloat16(), threads)
    others = {"bfloat16": dense_walk(bench, outputs, x.bfloat16()), "float32": dense_walk(bench, outputs, x)}
    seconds = medians({**walks, **others, "read": bench.reading(threads)}, bench.arguments.rounds)
    bench.lib.lbllm_choose_tier(bench.best.encode())
    bandwidth = CHUNK / seconds["read"]
    kernels = []
    for key in walks:
        speed = stored_bytes(inputs, outputs, key[1]) / seconds[key]
        record = dict(zip(("tier", "group_size", "granularity"), key, strict=True))
        record |= {"us": seconds[key] * 1e6, "gb_s": speed / 1e9, "bandwidth_share": speed / bandwidth}
        kernels.append(record | {f"times_{name}": seconds[name] / seconds[key] for name in others})
    torch_us = {name: seconds[name] * 1e6 for name in others}
    return {"rounds": bench.arguments.rounds, "read_gb_s": bandwidth / 1e9, "torch_us": torch_us, "kernels": kernels}


def write_random(folder: Path, name: str) -> None:
    """A packed folder of a Llama with random weights."""
    *sizes, group_size = MODELS[name]
    config = LlamaConfig(**dict(zip(SIZES, sizes, strict=True)), tie_word_embeddings=True)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    layout = ActivationFormat(4, 4, "group", "knee", "knee", len(TABLES), group_size)
    config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored["quantization_config"] = quantization_config(group_size, "act-calib", layout.as_dict())
    files.write_json(folder / "config.json", stored)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for key, like in model.state_dict().items():
        owner = key.removesuffix(".weight")
        if owner.endswith(LINEARS):
            parts = random_packed(like.shape[1], like.shape[0], group_size)
            tensors |= {f"{owner}.{part}": tensor for part, tensor in parts.items()}
        elif owner != "lm_head":
            tensors[key] = torch.empty(like.shape, dtype=torch.bfloat16).normal_(0, WEIGHT_RMS).add_(like.ndim == 1)
    for index, layer in enumerate(model.model.layers):
        for own, width in quantizer_widths(layer).items():
            parts = ActQuantizer(tables_of(TABLES), layout.size(width)).state_dict()
            tensors |= {f"model.layers.{index}.{own}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Subject:
    """A packed model and its dense counterpart, loaded when first needed. scratch: folder for a random one."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path):
        self.arguments, self.scratch = arguments, scratch
        self.name = arguments.model.as_posix() if arguments.model else f"random {arguments.random}"

    @cached_property
    def folder(self) -> Path:
        """The packed model's."""
        if not self.arguments.model:
            write_random(self.scratch, self.arguments.random)
        return Path(self.arguments.model or self.scratch)

    @cached_property
    def packed(self) -> Any:
        """With compiled kernels."""
        return prepared(AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16))

    @cached_property
    def dense(self) -> Any:
        """In bfloat16, with the base's weights or random ones."""
        if self.arguments.base:
            return prepared(AutoModelForCausalLM.from_pretrained(self.arguments.base, dtype=torch.bfloat16))
        config = AutoConfig.from_pretrained(self.folder)
        del config.quantization_config
        return prepared(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))

    def prompt(self, length: int) -> Tensor:
        """Random tokens [1, length]."""
        return torch.randint(self.packed.config.vocab_size, (1, length))


def prepared(model: Any) -> Any:
    """Ready for `generate` to make as many tokens as it is asked for."""
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.no_grad()
def prefill(model: Any, prompt: Tensor) -> float:
    """Seconds per token of a pass into a new cache, with the logits of the last token, as `generate` begins."""
    began = perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return (perf_counter() - began) / prompt.shape[1]


@torch.no_grad()
def decode(model: Any, prompt: Tensor) -> float:
    """Seconds per greedy token after the prompt, in a plain loop."""
    out = model(prompt, use_cache=True, logits_to_keep=1)
    began = perf_counter()
    for _ in range(NEW):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return (perf_counter() - began) / NEW


def generate(model: Any, prompt: Tensor) -> float:
    """Seconds per new token of `generate`, with the prompt's."""
    began = perf_counter()
    model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    return (perf_counter() - began) / NEW


def measure_model(bench: Bench, subject: Subject, threads: int) -> Record:
    """Tokens per second of the packed and of the dense model."""
    torch.set_num_threads(threads)
    long, short = subject.prompt(PREFILL), subject.prompt(PROMPT)
    candidates: dict[Any, Callable[[], float]] = {}
    for kind, model in (("packed", subject.packed), ("dense", subject.dense)):
        works = partial(prefill, model, long), partial(decode, model, short), partial(generate, model, short)
        candidates |= {(kind, name): work for name, work in zip(WORK, works, strict=True)}
    seconds = medians(candidates, bench.arguments.rounds)
    speeds: Record = {kind: {work: 1 / seconds[kind, work] for work in WORK} for kind in ("packed", "dense")}
    ratio = {work: speeds["packed"][work] / speeds["dense"][work] for work in WORK}
    return {"rounds": bench.arguments.rounds, "tokens_per_second": speeds, "ratio": ratio}


def measure_memory(subject: Subject) -> Record:
    """Resident memory of a fresh process that loads the packed model."""
    result = subprocess.run([sys.executable, "-c", LOADING, str(subject.folder)], check=True, stdout=subprocess.PIPE, text=True)
    record: Record = json.loads(result.stdout)
    record["files_bytes"] = sum(path.stat().st_size for path in subject.folder.glob("*.safetensors"))
    return {**record, "peak_ratio": record["peak_bytes"] / (record["files_bytes"] + record["imports_bytes"])}


@contextmanager
def without(model: Any, blocks: bool, head: bool) -> Iterator[None]:
    """Decode steps that cost nothing in the blocks (they only count the new token in the cache) or in the head."""
    layers, output = list(model.get_decoder().layers), model.get_output_embeddings()
    steps = [layer.forward for layer in layers]
    logits = torch.zeros(1, 1, output.out_features, dtype=torch.bfloat16)

    def skipping(index: int, hidden_states: Tensor, past_key_values: Any = None, **others: Any) -> Any:
        if hidden_states.shape[1] > 1:
            return steps[index](hidden_states, past_key_values=past_key_values, **others)
        past_key_values.layers[index].grown(1)
        return hidden_states

    try:
        if blocks:
            for index, layer in enumerate(layers):
                layer.forward = partial(skipping, index)
        if head:
            output.forward = lambda hidden: logits
        yield
    finally:
        for layer, step in zip(layers, steps, strict=True):
            layer.forward = step
        output.__dict__.pop("forward", None)


def measure_floor(bench: Bench, subject: Subject, threads: int) -> Record:
    """A decode step whole and without its parts, and what it has to read."""
    torch.set_num_threads(threads)
    model, rounds = subject.packed, bench.arguments.rounds
    prompt = subject.prompt(PROMPT)

    def step(blocks: bool, head: bool) -> float:
        with without(model, blocks, head):
            return decode(model, prompt)

    parts = {"whole": (False, False), "no_blocks": (True, False), "no_head": (False, True), "neither": (True, True)}
    candidates: dict[str, Callable[[], float]] = {name: partial(step, *wanted) for name, wanted in parts.items()}
    seconds = medians({**candidates, "read": bench.reading(threads)}, rounds)
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    sizes = {
        "linears_bytes": int(sum(stored_bytes(x.in_features, x.out_features, x.group_size) for x in linears)),
        "head_bytes": model.get_output_embeddings().weight.nbytes,
    }
    bandwidth = CHUNK / seconds["read"]
    speeds = {name: 1 / seconds[name] for name in parts} | {"reading": bandwidth / sum(sizes.values())}
    record = {"rounds": rounds, "tokens_per_second": speeds, "read_gb_s": bandwidth / 1e9, **sizes}
    return {**record, "times_floor": speeds["reading"] / speeds["whole"]}


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
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections; default linear, and all with a model")
    parser.add_argument("--out", type=Path, help="JSON file to begin or to go on with")
    parser.add_argument("--force", action="store_true", help="measure what the file has already, too")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, after one that is not")
    parser.add_argument("--shapes", nargs="+", default=LINEAR_SHAPES, metavar="IN:OUT")
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 128], help="tokens that a linear gets")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=TIERS, help="those that this CPU lacks are left out")
    parser.add_argument("--cache-mib", type=int, help="last-level cache; default what the system says")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="packed folder; needs --base for the model section")
    which.add_argument("--random", choices=MODELS, help="random packed weights of this architecture")
    parser.add_argument("--base", type=Path, help="dense folder that --model was made from")
    arguments = parser.parse_args()
    whole = arguments.model or arguments.random
    arguments.only = arguments.only or (SECTIONS if whole else SECTIONS[:1])
    if not whole and set(arguments.only) != {"linear"}:
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
