#!/usr/bin/env python3
"""One slice of what only a GPU can tell; scripts/on_gpu.sh runs them all.

    python scripts/bench/gpu.py linear --out OUT     writes OUT/linear.json, line by line as it is measured
    python scripts/bench/gpu.py table --out OUT      OUT/*.json as OUT/gpu.md

Times are medians of CUDA events over many calls, each call on another copy of its weights: together they exceed the card's cache.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lbllm_cli.core import files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
BATCHES = (1, 4, 16, 128)
LINEARS = ((4096, 4096), (4096, 11008), (4096, 14336))
# What a card's cache holds is never more than this.
_BEYOND_CACHE = 512 << 20
# Of `pipeline`, to train SmolLM2 on: what the bundled text has, at 512 tokens each.
SEQUENCES = 3840


def timed(calls: list[Callable[[], Any]], seconds: float = 1.0) -> float:
    """Median seconds of one call; calls: the same work on different memory, taken in turn."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds and len(times) < 400:
        for call in calls:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            times.append((first, last))
        torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in times) / 1e3


def copy_rate() -> float:
    """Bytes a second that a copy on the card reads and writes."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / timed([lambda: y.copy_(x)])


def machine() -> dict[str, Any]:
    """What a measurement belongs to."""
    import triton

    card = torch.cuda.get_device_properties(0)
    return {
        "card": card.name, "memory": card.total_memory, "multiprocessors": card.multi_processor_count, "torch": torch.__version__,
        "triton": triton.__version__, "python": sys.version.split()[0],
    }  # fmt: skip


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Record:
    """A slice's results, written after each."""

    def __init__(self, path: Path):
        self.path, self.values = path, machine() | {"rows": []}

    def add(self, **row: Any) -> None:
        """One line of the table."""
        print(", ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        self.values["rows"].append(row)
        self.save(partial=True)

    def save(self, partial: bool = False) -> None:
        """Writes them; a partial file has a name of its own, so that the slice is run again."""
        files.write_json(self.path.with_suffix(".partial.json") if partial else self.path, self.values)
        if not partial:
            self.path.with_suffix(".partial.json").unlink(missing_ok=True)


def suite(record: Record) -> None:
    """Tests that run kernels on the card, and the stages."""
    chosen = ["tests/gpu", "tests/runtime/cuda", "tests/ptq", "tests/training", "tests/format"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "4", "-p", "no:cacheprovider", *chosen]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(ended.stdout[-6000:])
    record.add(suite=" ".join(chosen), exit=ended.returncode, summary=ended.stdout.strip().splitlines()[-1])
    if ended.returncode:
        raise SystemExit("a test failed")


def linear(record: Record) -> None:
    """One linear at four batch sizes: packed with 4-bit and with full-precision activations, beside torch in 16 bits."""
    from packed_linears import packed_linear

    rate = copy_rate()
    record.values["copied_bytes_per_second"] = rate
    for width, out in LINEARS:
        copies = -(-_BEYOND_CACHE // (width * out // 4))
        packed = {kind: [packed_linear(width, out, kind) for _ in range(copies)] for kind in ("A4", "A16")}
        copies = -(-_BEYOND_CACHE // (width * out * 2))
        dense = [torch.randn(out, width, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        for batch in BATCHES:
            x = torch.randn(batch, width, device="cuda", dtype=torch.bfloat16)
            for dtype in (torch.bfloat16, torch.float16):
                y, weights = x.to(dtype), [weight.to(dtype) for weight in dense]
                seconds = timed([lambda w=weight: torch.nn.functional.linear(y, w) for weight in weights])  # noqa: B023
                record.add(linear=f"{width} x {out}", batch=batch, kind=f"torch {dtype}"[-8:], us=seconds * 1e6)
            for kind, units in packed.items():
                seconds = timed([lambda unit=unit: unit.run(x) for unit in units])  # noqa: B023
                share = out * width * 2.375 / 8 / seconds / rate
                record.add(linear=f"{width} x {out}", batch=batch, kind=kind, us=seconds * 1e6, bandwidth_share=share)


def decode(record: Record) -> None:
    """Tokens per second of 7B- and 8B-shaped models: packed, and transformers in bfloat16."""
    from random_models import config_of, dense_model, packed_model

    device = torch.device("cuda")
    for name in ("llama2-7b", "llama3-8b"):
        config = config_of(name)
        for kind, make in (
            ("A4KV4", lambda: packed_model(config, device)),  # noqa: B023
            ("A16", lambda: packed_model(config, device, quantized=False)),  # noqa: B023
            ("bfloat16", lambda: dense_model(config, device)),  # noqa: B023
        ):
            torch.cuda.reset_peak_memory_stats()
            model = make()
            for prompt, rows in ((512, 1), (2048, 1), (512, 16)):
                record.add(model=name, kind=kind, prompt=prompt, rows=rows, **_generated(model, config.vocab_size, prompt, rows))
            if kind == "bfloat16":
                record.add(model=name, kind="bfloat16, compiled", prompt=512, rows=1, **_compiled(model, config.vocab_size))
            record.add(model=name, kind=kind, peak_gib=torch.cuda.max_memory_allocated() / 2**30)
            del model
            torch.cuda.empty_cache()


def _generated(model: Any, vocab: int, prompt: int, rows: int, tokens: int = 64) -> dict[str, float]:
    """Seconds of a prefill and of a decode step, as `generate` does them."""
    ids = torch.randint(0, vocab, (rows, prompt), device="cuda")
    with torch.no_grad():
        for _ in range(2):
            torch.cuda.synchronize()
            began = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            prefill = time.perf_counter() - began
        cache, last = out.past_key_values, out.logits.argmax(-1)
        mask = torch.ones(rows, prompt + tokens + 8, dtype=torch.int64, device="cuda")
        for step in range(tokens + 4):
            if step == 4:
                torch.cuda.synchronize()
                began = time.perf_counter()
            out = model(last, past_key_values=cache, attention_mask=mask[:, : prompt + step + 1], use_cache=True)
            last = out.logits.argmax(-1)
        torch.cuda.synchronize()
    each = (time.perf_counter() - began) / tokens
    return {"prefill_ms": prefill * 1e3, "step_ms": each * 1e3, "tokens_per_second": rows / each}


def _compiled(model: Any, vocab: int, tokens: int = 64) -> dict[str, float]:
    """transformers' own fastest way: a static cache and torch.compile."""
    ids = torch.randint(0, vocab, (1, 512), device="cuda")


    def seconds(count: int) -> float:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "cache_implementation": "static"}
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.generate(ids, **options)
            torch.cuda.synchronize()
        return time.perf_counter() - began

    try:
        # Of twice as many less of these: the prompt is in both, and is no step.
        each = (seconds(2 * tokens) - seconds(tokens)) / tokens
    except Exception as error:
        print(f"transformers' compiled way does not run here: {type(error).__name__}: {str(error)[:200]}")
        return {}
    return {"step_ms": each * 1e3, "tokens_per_second": 1 / each}


def blocks(record: Record) -> None:
    """Two blocks of a 7B's and an 8B's shape through ptq, distill and act-calib, and their peaks beside the forecasts."""
    from real_blocks import run_blocks

    for model in ("llama2-7b", "llama3-8b"):
        folder = record.path.parent / "blocks" / model
        for facts in run_blocks(model, folder):
            record.add(model=model, **facts)
        shutil.rmtree(folder)


def pipeline(record: Record) -> None:
    """Every command on the toy, and on SmolLM2-135M where it is there."""
    toy, smollm2 = ROOT / "tests/assets/toy", ROOT / "models/smollm2-135m"
    runs = [("toy", ROOT / "recipes/toy.yaml", toy, [])]
    if (smollm2 / "config.json").exists():
        # 2 million tokens.
        text = ["data.training.source=builtin:training", f"data.training.sequences={SEQUENCES}"]
        runs.append(("smollm2-135m", ROOT / "recipes/smollm2-135m.yaml", smollm2, text))
    for name, recipe, model, changes in runs:
        out = record.path.parent / "runs" / name
        overrides = [f"model.path={model}", f"output.dir={out}", "runtime.device=cuda", *changes]
        for command in ("ptq", "distill", "act-calib", "eval", "export"):
            began = time.perf_counter()
            call = [sys.executable, "-m", "lbllm_cli", command, "--recipe", str(recipe), *overrides]
            ended = subprocess.run(call, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "4"})
            seconds = _taken(out, command) or time.perf_counter() - began
            record.add(run=name, command=command, exit=ended.returncode, seconds=seconds)
            if ended.returncode:
                raise SystemExit(ended.stderr[-3000:])
        else:
            record.values[f"{name} eval"] = json.loads((out / "eval/results.json").read_text())


def _taken(out: Path, command: str) -> float:
    """What the blocks of a stage took by its records, whichever attempt they were of; 0 of what is no stage."""
    events = out / command / "events.jsonl"
    lines = events.read_text().splitlines() if events.exists() else []
    return float(sum(found.get("seconds", 0.0) for found in map(json.loads, lines)))


def table(out: Path) -> None:
    """All slices as Markdown."""
    lines: list[str] = []
    for path in sorted(out.glob("*.json")):
        found = json.loads(path.read_text())
        if "card" not in found:
            continue
        machine_line = f"{found['card']}, torch {found['torch']}, Triton {found['triton']}"
        lines += [f"## {path.stem.removesuffix('.partial')}", "", machine_line, ""]
        kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in found["rows"]:
            kinds.setdefault(tuple(row), []).append(row)
        for keys, rows in kinds.items():
            lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
            lines += ["| " + " | ".join(map(_shown, row.values())) + " |" for row in rows] + [""]
    files.write_text(out / "gpu.md", "\n".join(lines))
    print("\n".join(lines))


SLICES = {"suite": suite, "linear": linear, "decode": decode, "blocks": blocks, "pipeline": pipeline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slice", choices=[*SLICES, "table"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.slice == "table":
        table(arguments.out)
        return
    if not torch.cuda.is_available():
        sys.exit("this torch sees no GPU")
    record = Record(arguments.out / f"{arguments.slice}.json")
    SLICES[arguments.slice](record)
    record.save()


if __name__ == "__main__":
    main()
