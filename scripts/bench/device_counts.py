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
BUDGETS = ROOT / "tests" / "simulated_gpu" / "budgets.json"
RECORDED = "llama2-7b"
GIB = 2**30
COLUMNS = ("phase", "times", "kernels", "waits", "GB moved", "TFLOP", "GB up", "GB down", "ms", "peak GiB")


def _arguments(models: list[str], things: list[str], cards: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = f"{', '.join(models)}; {', '.join(things)}, all"
    parser.add_argument("words", nargs="*", metavar="MODEL THING [KEY=VALUE ...]", help=listed)
    parser.add_argument("--model-config", type=Path, metavar="FILE", help="config.json of another model, in the place of MODEL")
    parser.add_argument("--card", choices=cards, default="h100")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes what was counted")
    parser.add_argument("--record", action="store_true", help="replaces the budgets that tests compare with")
    arguments = parser.parse_args()
    words = [RECORDED, "all"] if arguments.record else arguments.words
    arguments.changes = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    arguments.model = str(arguments.model_config or (names.pop(0) if names else ""))
    arguments.things = things if names == ["all"] else names
    if not arguments.model_config and arguments.model not in models:
        parser.error(f"expected one of {', '.join(models)}, or --model-config, got {arguments.model or 'nothing'}")
    if not arguments.things or not set(arguments.things) <= set(things):
        parser.error(f"expected one of {', '.join(things)} or all, got {' '.join(names) or 'nothing'}")
    return arguments


def _counted(device: Any, arguments: argparse.Namespace, thing: str) -> dict[str, Any]:
    """In a child: the package is changed for what is counted."""
    from random_models import config_of
    from simulated_gpu.install import become
    from transformers import AutoConfig
    from true_shapes import count

    from lbllm_cli.runtime.cards import CARDS

    become(device, CARDS[arguments.card])
    config = AutoConfig.from_pretrained(arguments.model) if arguments.model_config else config_of(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        return count(device, thing, config, Path(folder), arguments.changes)


def _print(arguments: argparse.Namespace, thing: str, facts: dict[str, Any]) -> None:
    peak, forecast = facts["peak"], facts["forecast"]
    compared = f", forecast {forecast / GIB:.2f} GiB, {forecast / peak:.2f} of it" if forecast else ""
    print(f"{arguments.model}, {thing}: peak {peak / GIB:.2f} GiB{compared}; times of {arguments.card}, arithmetic")
    rows = [COLUMNS]
    for name, phase in facts["phases"].items():
        flops = " ".join(f"{kind} {flop / 1e12:.2f}" for kind, flop in phase["flops"].items())
        copies = (f"{phase[way] / 1e9:.3f}" for way in ("uploads", "downloads"))
        counts = (f"{phase['kernels']:,.0f}", f"{sum(phase['syncs'].values()):,.0f}")
        moved, seconds = (phase["read"] + phase["written"]) / 1e9, phase["seconds"]
        rows.append(
            (name, str(phase["times"]), *counts, f"{moved:,.2f}", flops, *copies, f"{1e3 * seconds:,.1f}",
             f"{phase['peak'] / GIB:.2f}")
        )  # fmt: skip
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        name, *cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("", name.strip().ljust(widths[0]), *cells, sep="  ")
    for rule, where in facts["broken"]:
        print(f"  {where}: {rule}")


def _budget(facts: dict[str, Any]) -> dict[str, Any]:
    """What tests hold a thing to: bytes at the peak, and of each phase kernels, waits, bytes moved."""
    phases = {
        name: {
            "kernels": round(phase["kernels"]),
            "waits": round(sum(phase["syncs"].values())),
            "bytes": round(phase["read"] + phase["written"]),
        }
        for name, phase in facts["phases"].items()
    }
    return {"peak": facts["peak"], "phases": phases}


def main() -> None:
    """Counts, prints, writes."""
    sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]
    from simulated_gpu import build

    build.preload()
    from simulated_gpu.children import forked
    from simulated_gpu.install import install

    # Before the package is imported, functions of which are wrapped.
    device, _ = install(shape=True)
    from random_models import SHAPES
    from true_shapes import THINGS

    from lbllm_cli.runtime.cards import CARDS

    arguments = _arguments(list(SHAPES), list(THINGS), list(CARDS))
    found: dict[str, Any] = {}
    for thing in arguments.things:
        found[thing] = forked(partial(_counted, device, arguments, thing))
        _print(arguments, thing, found[thing])
    if arguments.json:
        facts = {"model": arguments.model, "card": arguments.card, "changes": arguments.changes, "things": found}
        arguments.json.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if arguments.record:
        budgets = {thing: _budget(facts) for thing, facts in found.items()}
        BUDGETS.write_text(json.dumps(budgets, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
