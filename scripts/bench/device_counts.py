#!/usr/bin/env python3
"""What a stage, or a loaded model, does on a GPU at the true shape of a large model, counted on a simulated device.

    python scripts/bench/device_counts.py llama2-7b distill
    python scripts/bench/device_counts.py 70b ptq --card a100 --json counts.json
    python scripts/bench/device_counts.py --model-config config.json act-calib act_calib.micro_batch_size=2
    python scripts/bench/device_counts.py --record              counts of llama2-7b into tests/simulated_gpu/budgets.json

A stage runs over one block, the end-to-end phases over the whole model, with a few sequences of 2,048 tokens. No number is worked
out: large tensors have shapes alone. Device time is arithmetic, with what the card's maker says and 2.5 us a kernel; nothing ran
on a GPU. Loops over columns are sampled. LBLLM_KERNELS=off counts what torch does without the package's kernels.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

from simulated_gpu import build

build.preload()

from simulated_gpu.children import forked
from simulated_gpu.install import become, install

DEVICE, _ = install(shape=True)

from random_models import SHAPES, config_of
from transformers import AutoConfig
from true_shapes import THINGS, Counted, count

from lbllm_cli.runtime.cards import CARDS

BUDGETS = ROOT / "tests" / "simulated_gpu" / "budgets.json"
RECORDED = "llama2-7b"
GIB = 2**30


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="MODEL THING [KEY=VALUE ...]", help=f"{', '.join(SHAPES)}; {', '.join(THINGS)}, all")
    parser.add_argument("--model-config", type=Path, metavar="FILE", help="config.json of another model, in the place of MODEL")
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes what was counted")
    parser.add_argument("--record", action="store_true", help="replaces the budgets that tests compare with")
    arguments = parser.parse_args()
    words = [RECORDED, "all"] if arguments.record else arguments.words
    arguments.changes = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    arguments.model = str(arguments.model_config) if arguments.model_config else names.pop(0) if names else ""
    arguments.things = list(THINGS) if names == ["all"] else names
    if not arguments.things or any(thing not in THINGS for thing in arguments.things):
        parser.error(f"expected one of {', '.join(THINGS)} or all, got {' '.join(names) or 'nothing'}")
    if not arguments.model_config and arguments.model not in SHAPES:
        parser.error(f"expected one of {', '.join(SHAPES)}, or --model-config, got {arguments.model}")
    return arguments


def _counted(arguments: argparse.Namespace, thing: str) -> Counted:
    """In a child: the package is changed for what is counted."""
    become(DEVICE, CARDS[arguments.card])
    own = arguments.model_config
    config = AutoConfig.from_pretrained(own.parent if own.name == "config.json" else own) if own else config_of(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        return count(DEVICE, thing, config, Path(folder), arguments.changes)


def _facts(counted: Counted) -> dict[str, Any]:
    """As JSON."""
    phases = {
        name: {
            "times": counted.times.get(name, 1), "kernels": row.kernels, "waits": dict(row.syncs), "read": row.read,
            "written": row.written, "flops": dict(row.flops), "uploads": row.uploads, "downloads": row.downloads,
            "seconds": row.seconds, "peak": counted.peaks.get(name, 0), "operators": dict(row.operators.most_common(12)),
        }
        for name, row in counted.phases.items()
    }  # fmt: skip
    return {"peak": counted.peak, "forecast": counted.forecast, "phases": phases, "broken": counted.broken}


def _print(arguments: argparse.Namespace, thing: str, facts: dict[str, Any]) -> None:
    print(f"{arguments.model}, {thing}: peak {facts['peak'] / GIB:.2f} GiB", end="")
    if facts["forecast"] is not None:
        print(f", forecast {facts['forecast'] / GIB:.2f} GiB, {facts['forecast'] / facts['peak']:.2f} of it", end="")
    print(f"; times of {CARDS[arguments.card].name}, arithmetic")
    columns = ("phase", "times", "kernels", "waits", "GB moved", "TFLOP", "GB up", "GB down", "ms", "peak GiB")
    rows = [columns]
    for name, phase in facts["phases"].items():
        flops = " ".join(f"{kind} {flop / 1e12:.2f}" for kind, flop in phase["flops"].items())
        moved = (phase["read"] + phase["written"]) / 1e9
        rows.append((
            name, str(phase["times"]), f"{phase['kernels']:,.0f}", f"{sum(phase['waits'].values()):,.0f}", f"{moved:,.2f}", flops,
            f"{phase['uploads'] / 1e9:.3f}", f"{phase['downloads'] / 1e9:.3f}", f"{1e3 * phase['seconds']:,.1f}",
            f"{phase['peak'] / GIB:.2f}",
        ))  # fmt: skip
    widths = [max(len(row[n]) for row in rows) for n in range(len(columns))]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths, strict=True))))
    for rule, where in facts["broken"]:
        print(f"  {where}: {rule}")


def budget_of(facts: dict[str, Any]) -> dict[str, Any]:
    """What tests hold a thing to: bytes at the peak, and of each phase kernels, waits, bytes moved."""
    phases = {
        name: {"kernels": round(phase["kernels"]), "waits": round(sum(phase["waits"].values())), "bytes": round(phase["read"] + phase["written"])}
        for name, phase in facts["phases"].items()
    }  # fmt: skip
    return {"peak": facts["peak"], "phases": phases}


def main() -> None:
    """Counts, prints, writes."""
    arguments = _arguments()
    found: dict[str, Any] = {}
    for thing in arguments.things:
        found[thing] = _facts(forked(partial(_counted, arguments, thing)))
        _print(arguments, thing, found[thing])
    if arguments.json:
        facts = {"model": arguments.model, "card": arguments.card, "changes": arguments.changes, "things": found}
        arguments.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if arguments.record:
        BUDGETS.write_text(json.dumps({thing: budget_of(facts) for thing, facts in found.items()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
