#!/usr/bin/env python3
"""Runs variants of `lbllm ptq` on one recipe and writes one table: perplexity per text, and time of the stage.

    python scripts/ablate.py --recipe recipes/smollm2-135m.yaml --out runs/ablation [--segments 12] [--only NAME ...]

Every variant is a run folder of its own, so a stopped script goes on where it was, and finished variants cost nothing.
The table (table.md, table.json) is written again after every variant.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

VARIANTS: dict[str, list[str]] = {
    "default": [],
    "group 128": ["ptq.group_size=128"],
    "calibrated on novels": ["data.calibration.source=builtin:calibration/novels"],
    "calibrated on generate:": ['data.calibration.source="generate:"'],
    "calibrated on both halves": ['data.calibration.source=["builtin:calibration", "generate:"]'],
    "symmetric target": ["ptq.asymmetric=0"],
    "asymmetric 0.5": ["ptq.asymmetric=0.5"],
    "asymmetric 1": ["ptq.asymmetric=1"],
    "not sequential": ["ptq.sequential=false"],
    "not sequential, symmetric": ["ptq.sequential=false", "ptq.asymmetric=0"],
    "no refit": ["ptq.refit=false"],
    "no code descent": ["ptq.code_descent=false"],
    "no refinement": ["ptq.rounds=0"],
    "three rounds": ["ptq.rounds=3"],
    "no compensation": ["ptq.compensation=false"],
    "no compensation, no refinement": ["ptq.compensation=false", "ptq.rounds=0"],
    "quantile levels": ["ptq.levels=quantile"],
    "quantile levels, no refinement": ["ptq.levels=quantile", "ptq.rounds=0"],
    "importance diag H": ["ptq.importance=hessian_diagonal"],
}


def lbllm(*arguments: str) -> None:
    """One command; its failure ends the script with the command's own message."""
    command = [sys.executable, "-m", "lbllm_cli", *arguments]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        sys.exit(code)


def measure(recipe: str, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Runs one variant, or finds it finished: its perplexities and the seconds its blocks took."""
    common = [f"output.dir={folder}", *overrides]
    lbllm("ptq", "--recipe", recipe, *common)
    results = folder / "eval" / "results.json"
    if not results.exists():
        lbllm("eval", "--recipe", recipe, *common, "eval.checkpoints=[ptq]")
    events = (folder / "ptq" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = {event["block"]: event["seconds"] for event in map(json.loads, events)}
    return {**json.loads(results.read_text(encoding="utf-8"))["ptq"], "seconds": round(sum(seconds.values()))}


def base_perplexity(recipe: str, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The full-precision model, measured once."""
    results = folder / "eval" / "results.json"
    if not results.exists():
        lbllm("eval", "--recipe", recipe, f"output.dir={folder}", *overrides, "eval.checkpoints=[base]")
    return json.loads(results.read_text(encoding="utf-8"))["base"]


def write_table(out: Path, rows: dict[str, dict[str, Any]]) -> None:
    """table.json, and table.md with the ratio to full precision beside each perplexity."""
    (out / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    base = rows["full precision"]["perplexity"]
    lines = [f"| variant | {' | '.join(base)} | bits per weight | seconds |", "|---|" + "---:|" * (len(base) + 2)]
    for name, row in rows.items():
        cells = [f"{row['perplexity'][text]:.2f} ({row['perplexity'][text] / base[text]:.2f}x)" for text in base]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['bits_per_weight']:.3f} | {row.get('seconds', '')} |")
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Reads the arguments and runs the variants in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help="variants to run; default all")
    parser.add_argument("--segments", type=int, default=12, help="evaluation segments per style")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a segment")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sets = [
        {"name": style, "source": f"builtin:evaluation/{style}", "length": arguments.length, "segments": arguments.segments}
        for style in ("novels", "technical", "modern")
    ]
    common = [f"data.evaluation={json.dumps(sets)}"]
    settings = {"segments": arguments.segments, "length": arguments.length}
    record = arguments.out / "settings.json"
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) != settings:
        sys.exit(f"{arguments.out} holds a table of other --segments or --length; choose another --out")
    record.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    rows = {"full precision": base_perplexity(arguments.recipe, arguments.out / "base", common)}
    for name in arguments.only or VARIANTS:
        folder = arguments.out / name.replace(" ", "-").replace(",", "").replace(":", "")
        rows[name] = measure(arguments.recipe, folder, [*common, *VARIANTS[name]])
        write_table(arguments.out, rows)
        print(f"{name}: {rows[name]['perplexity']}, {rows[name]['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
