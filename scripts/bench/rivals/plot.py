#!/usr/bin/env python3
"""Bits per weight against perplexity and KL of all rows of `run.py`, beside lbllm's own checkpoints; OUT/pareto.svg.

    python scripts/bench/rivals/plot.py --out runs/rivals --points docs/pareto.json [--ours LABEL=RUN_FOLDER:STAGE ...]
        [--texts novels technical modern]

A run folder of lbllm holds eval/results.json, which `lbllm eval` writes. OUT/pareto.json has the rows of the picture; --points
takes such a file, so that none of them has to be made again: those of OUT, and of --ours, take the place of its rows of the same
name. All have to be measured on the same texts.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run import BASE, RIVALS, file_of

from lbllm_cli.core import files


@dataclass(frozen=True)
class Point:
    """One checkpoint. perplexity: by text, times full precision; kl: by text, nats. ours: of lbllm."""

    label: str
    bits: float
    perplexity: dict[str, float]
    kl: dict[str, float]
    ours: bool


def point(label: str, row: dict[str, Any], base: dict[str, Any]) -> Point:
    """A row of `run.py` or of `own`; base: the full-precision model's."""
    ratios = {text: found / base["perplexity"][text] for text, found in row["perplexity"].items()}
    return Point(label, row["bits_per_weight"], ratios, row["kl"], row.get("ours", False))


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (bits, loss) those that no other beats: none has fewer or as many bits and a smaller loss. In order of bits.

    [(2, 3), (2, 4), (3, 1), (4, 2)] -> [(2, 3), (3, 1)].
    """
    found: list[tuple[float, float]] = []
    for bits, loss in sorted(points):
        if not found or loss < found[-1][1]:
            found.append((bits, loss))
    return found


def rows_in(out: Path) -> dict[str, dict[str, Any]]:
    """All rows there are by name, the full-precision model's first."""
    rows = {}
    for name in [BASE, *(name for names in RIVALS.values() for name in names)]:
        if (path := file_of(out, name, ".json")).exists():
            rows[name] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def own(argument: str, base: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The row of LABEL=RUN_FOLDER:STAGE. Raises ValueError where its full precision has other perplexities than `base`."""
    label, _, rest = argument.partition("=")
    folder, _, stage = rest.rpartition(":")
    if not (label and folder and stage):
        raise ValueError(f"--ours {argument}: expected LABEL=RUN_FOLDER:STAGE")
    results = json.loads((Path(folder) / "eval" / "results.json").read_text(encoding="utf-8"))
    if missing := {"base", stage} - set(results):
        raise ValueError(f"{folder}: {', '.join(sorted(missing))} is not measured; it has {', '.join(results)}")
    for text, found in base["perplexity"].items():
        # Text of another length or model gives another number; threads change the fourth digit behind the point.
        if abs(results["base"]["perplexity"].get(text, 0) / found - 1) > 1e-3:
            raise ValueError(f"{folder}: full precision on {text} is not the {found} that the rivals are measured beside")
    return label, {key: results[stage][key] for key in ("bits_per_weight", "perplexity", "kl")} | {"ours": True}


def draw(points: list[Point], texts: list[str], path: Path) -> None:
    """A column per text: perplexity above, KL below; both axes of loss logarithmic, the front of all points drawn through."""
    import matplotlib
    from matplotlib.figure import Figure

    # Without it what a drawing refers to has other names every time.
    matplotlib.rcParams["svg.hashsalt"] = "lbllm"
    figure = Figure(figsize=(1 + 5 * len(texts), 9), layout="constrained")
    grid = figure.subplots(2, len(texts), squeeze=False, sharex=True)
    titles = {"perplexity": "perplexity, times full precision", "kl": "KL to full precision, nats"}
    for row, (kind, title) in zip(grid, titles.items(), strict=True):
        for axes, text in zip(row, texts, strict=True):
            losses = [getattr(one, kind)[text] for one in points]
            line = front([(one.bits, loss) for one, loss in zip(points, losses, strict=True)])
            axes.step([bits for bits, _ in line], [loss for _, loss in line], where="post", color="0.7", zorder=1)
            for one, loss in zip(points, losses, strict=True):
                color, marker, below = ("C3", "D", -9) if one.ours else ("C0", "o", 3)
                axes.plot(one.bits, loss, marker, color=color, zorder=2)
                axes.annotate(one.label, (one.bits, loss), xytext=(5, below), textcoords="offset points", fontsize=8, color=color)
            axes.set(yscale="log", title=f"{title}: {text}")
            axes.margins(x=0.18)
            # Less than a decade is shown: without a word on the ticks between, one number would stand on an axis.
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.grid(alpha=0.3, which="both")
    for axes in grid[1]:
        axes.set_xlabel("bits per weight of the blocks' linears")
    figure.savefig(path, metadata=dict.fromkeys(("Date", "Creator")))


def main() -> None:
    """Reads the arguments and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--points", type=Path, metavar="FILE", help="a pareto.json whose rows are drawn as well")
    parser.add_argument("--ours", nargs="+", default=[], metavar="LABEL=RUN_FOLDER:STAGE", help="checkpoints of lbllm")
    parser.add_argument("--texts", nargs="+", default=["novels"], help="a column each")
    arguments = parser.parse_args()
    try:
        rows = json.loads(arguments.points.read_text(encoding="utf-8")) if arguments.points else {}
        rows |= rows_in(arguments.out)
        if BASE not in rows:
            sys.exit(f"{arguments.out} holds no rows; run run.py first, or name a file of rows with --points")
        rows |= dict(own(word, rows[BASE]) for word in arguments.ours)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    files.write_json(arguments.out / "pareto.json", rows)
    points = [point(name, row, rows[BASE]) for name, row in rows.items() if name != BASE]
    draw(points, arguments.texts, arguments.out / "pareto.svg")
    print(arguments.out / "pareto.svg")


if __name__ == "__main__":
    main()
