#!/usr/bin/env python3
"""A recipe with several seeds, and one table: mean ratio of perplexity to full precision, with its 95 % interval.

    python scripts/seeds.py --recipe recipes/smollm2-135m-2.5-bits.yaml --out runs/seeds --seeds 0 1 2 [KEY=VALUE ...]

A seed chooses the calibration windows and the order of the training text. Every seed is a run folder of its own, OUT/SEED, whose
stages go on where they were; a seed with all of its rows measured is not run again. OUT/settings.yaml has what they share:
another recipe, or other keys, need another OUT. Stages run with the keys given; `eval` in float32.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from lbllm_cli.recipe.load import dump_recipe, load_recipe

# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t.

    `interval([1.0, 1.1, 1.2])` is (1.1, 0.248): 4.303 times a deviation of 0.1 over the root of 3.
    """
    if len(values) == 1:
        return values[0], math.nan
    return statistics.mean(values), STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def run_seed(recipe: str, folder: Path, keys: list[str]) -> dict[str, Any]:
    """Results of `lbllm eval` after every stage that the recipe has."""
    results = folder / "eval" / "results.json"
    wanted = [spec.name for spec in load_recipe(Path(recipe), keys).stages]
    texts = {text.name for text in load_recipe(Path(recipe), keys).data.evaluation}

    def missing(measured: dict[str, Any]) -> bool:
        return any(texts - set(measured.get(name, {}).get("perplexity", {})) for name in ("base", *wanted))

    if not results.exists() or missing(json.loads(results.read_text(encoding="utf-8"))):
        commands = dict.fromkeys(name.removesuffix("-e2e") for name in wanted)
        for command, more in [(command, []) for command in commands] + [("eval", ["model.dtype=float32"])]:
            line = [sys.executable, "-m", "lbllm_cli", command, "--recipe", recipe, *keys, *more]
            if code := subprocess.run(line, check=False).returncode:
                sys.exit(code)
    measured: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return measured


def check_settings(recipe: str, keys: list[str], out: Path) -> None:
    """Ends the script where `out` holds seeds of another recipe or of other keys."""
    found = dump_recipe(load_recipe(Path(recipe), [*keys, f"output.dir={out.resolve()}", "runtime.seed=0"]))
    record = out / "settings.yaml"
    if record.exists() and record.read_text(encoding="utf-8") != found:
        sys.exit(f"{out} holds seeds of another recipe or of other keys; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(found, encoding="utf-8")


def table(seeds: dict[int, dict[str, Any]]) -> str:
    """A row per stage that all seeds have, a column per text."""
    first = next(iter(seeds.values()))
    texts = list(first["base"]["perplexity"])
    lines = [f"| after | {' | '.join(texts)} | KL {' | KL '.join(texts)} |", "|---|" + "---:|" * (2 * len(texts))]
    for stage in first:
        if stage == "base" or not all(stage in measured for measured in seeds.values()):
            continue
        cells = []
        for text in texts:
            ratios = [one[stage]["perplexity"][text] / one["base"]["perplexity"][text] for one in seeds.values()]
            cells.append("{:.3f}x ± {:.3f}".format(*interval(ratios)))
        cells += ["{:.3f} ± {:.3f}".format(*interval([one[stage]["kl"][text] for one in seeds.values()])) for text in texts]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the seeds in order and writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys that all seeds share")
    arguments = parser.parse_intermixed_args()
    keys = arguments.overrides + [word for word in arguments.seeds if "=" in word]
    chosen = [int(word) for word in arguments.seeds if "=" not in word]
    if len(chosen) > len(STUDENT) + 1:
        parser.error(f"at most {len(STUDENT) + 1} seeds; got {len(chosen)}")
    check_settings(arguments.recipe, keys, arguments.out)
    seeds: dict[int, dict[str, Any]] = {}
    for seed in chosen:
        folder = arguments.out / str(seed)
        seeds[seed] = run_seed(arguments.recipe, folder, [*keys, f"output.dir={folder.resolve()}", f"runtime.seed={seed}"])
        (arguments.out / "table.md").write_text(table(seeds), encoding="utf-8")
        print(f"seeds {', '.join(map(str, seeds))}:\n{table(seeds)}", flush=True)


if __name__ == "__main__":
    main()
