#!/usr/bin/env python3
"""Other quantizers of two to three bits on one recipe's model and texts, measured as `lbllm eval` measures, in one table.

    make .venv-rivals/.installed
    .venv-rivals/bin/python scripts/bench/rivals/run.py --recipe recipes/smollm2-135m.yaml --out runs/rivals [--only NAME ...]

A row is OUT/NAME.json and is not made again; OUT/table.md is written after every row. The model folder of a row that was made and
not yet measured is taken up again, and Block-AP's blocks that are trained; minutes are those of the run that ended it. Everything
is measured in float32.
"""

import argparse
import json
import shutil
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from ground import Ground, Rival, open_folder, open_ground, write_folder
from measure import measure, task_scores

from lbllm_cli.core import files
from lbllm_cli.recipe.load import dump_recipe, load_recipe
from lbllm_cli.recipe.schema import Recipe

# A module each, imported when one of its rivals is run: none needs the libraries of another.
RIVALS = {
    "ggml": ["Q2_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "Q3_K"],
    "gptq": ["GPTQ g64", "GPTQ g32", "GPTQ g64 mse", "GPTQ g32 mse"],
    "efficientqat": ["EfficientQAT Block-AP", "EfficientQAT Block-AP x16"],
    "e2e_qp": ["EfficientQAT E2E-QP"],
    "autoround": ["AutoRound", "AutoRound g32", "AutoRound best"],
}
BASE = "full precision"


def rival(name: str) -> Rival:
    """A rival by its name."""
    module = next(module for module, names in RIVALS.items() if name in names)
    found: Rival = import_module(module).RIVALS[name]
    return found


def file_of(out: Path, name: str, suffix: str = "") -> Path:
    """Where a row, or with another suffix its model, lies."""
    return out / ("".join(letter if letter.isalnum() else "-" for letter in name) + suffix)


def make_row(ground: Ground, name: str, found: Rival, keep: bool, tasks: bool) -> dict[str, Any]:
    """Makes a rival, or finds it made, and measures it."""
    folder, made = file_of(ground.out, name, ".model"), file_of(ground.out, name, ".made")
    if not (folder.exists() and made.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        start, cpu = time.monotonic(), time.process_time()
        result = found.make(ground)
        facts = {"minutes": (time.monotonic() - start) / 60, "core_minutes": (time.process_time() - cpu) / 60}
        write_folder(ground.model, result.weights, folder)
        files.write_json(made, {"note": result.note, **{key: round(value, 2) for key, value in facts.items()}})
    row = {"name": name, "bits_per_weight": found.bits, "formula": found.formula, **files.read_json(made)}
    row |= measure(ground, open_folder(ground, folder))
    row |= {"tasks": task_scores(ground, folder)} if tasks else {}
    files.write_json(file_of(ground.out, name, ".json"), row)
    if not keep:
        shutil.rmtree(folder)
        made.unlink()
    return row


def base_row(ground: Ground, tasks: bool) -> None:
    """The full-precision model's."""
    path = file_of(ground.out, BASE, ".json")
    if path.exists():
        return
    row = {"name": BASE, "bits_per_weight": 16.0, **measure(ground, None)}
    row |= {"tasks": task_scores(ground, ground.model.folder)} if tasks else {}
    files.write_json(path, row)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, by bits: perplexity and its ratio to full precision, KL and share of same likeliest tokens, per text."""
    base = next(row for row in rows if row["name"] == BASE)["perplexity"]
    rows = sorted(rows, key=lambda row: (-row["bits_per_weight"], row["name"]))
    tasks = sorted({task for row in rows for task in row.get("tasks", {})})
    heads = [*base, *(f"KL {text}" for text in base), *(f"same {text}" for text in base), *tasks]
    lines = [f"| | bits per weight | {' | '.join(heads)} | core minutes | note |", "|---|" + "---:|" * (len(heads) + 2) + "---|"]
    for row in rows:
        cells = [f"{row['perplexity'][text]:.2f} ({row['perplexity'][text] / base[text]:.2f}x)" for text in base]
        cells += [f"{row['kl'][text]:.3f}" if "kl" in row else "" for text in base]
        cells += [f"{row['top1'][text]:.1%}" if "top1" in row else "" for text in base]
        cells += [f"{row['tasks'][task]['acc']:.3f}" if task in row.get("tasks", {}) else "" for task in tasks]
        cells += [f"{row['core_minutes']:.1f}" if "core_minutes" in row else "", row.get("note", "")]
        lines.append(f"| {row['name']} | {row['bits_per_weight']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table(out: Path) -> None:
    """OUT/table.md, from all rows there are."""
    order = [BASE, *(name for names in RIVALS.values() for name in names)]
    rows = [json.loads(path.read_text(encoding="utf-8")) for name in order if (path := file_of(out, name, ".json")).exists()]
    files.write_text(out / "table.md", table(rows))


def resolved(arguments: argparse.Namespace) -> Recipe:
    """The recipe with the command line's keys; rivals are measured in float32, whatever it says."""
    keys = [*arguments.overrides, "model.dtype=float32", f"output.dir={json.dumps(str(arguments.out))}"]
    recipe = load_recipe(arguments.recipe, keys)
    if arguments.segments is None:
        return recipe
    sets = [item.model_copy(update={"segments": arguments.segments}).model_dump(mode="json") for item in recipe.data.evaluation]
    return load_recipe(arguments.recipe, [*keys, f"data.evaluation={json.dumps(sets)}"])


def main() -> None:
    """Reads the arguments and makes the rows in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rivals to run; default all but those run by name alone")
    parser.add_argument("--segments", type=int, help="evaluation segments per text; default the recipe's")
    parser.add_argument("--tasks", action="store_true", help="measure the bundled tasks as well")
    parser.add_argument("--keep", action="store_true", help="keep the model folder of every row, OUT/NAME.model")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys")
    arguments = parser.parse_intermixed_args()
    # Keys may follow the names: what holds an equals sign is no name.
    arguments.overrides += [word for word in arguments.only or () if "=" in word]
    names = [name for rivals in RIVALS.values() for name in rivals]
    only = [word for word in arguments.only or () if "=" not in word]
    if unknown := set(only) - set(names):
        parser.error(f"no such rival: {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    recipe = resolved(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = arguments.out / "settings.yaml"
    if record.exists() and record.read_text(encoding="utf-8") != dump_recipe(recipe):
        sys.exit(f"{arguments.out} holds rows of another recipe or of other keys; choose another --out")
    record.write_text(dump_recipe(recipe), encoding="utf-8")
    ground = open_ground(recipe, arguments.out)
    base_row(ground, arguments.tasks)
    for name in only or names:
        if file_of(arguments.out, name, ".json").exists():
            continue
        found = rival(name)
        if found.asked and name not in only:
            continue
        row = make_row(ground, name, found, arguments.keep, arguments.tasks)
        write_table(arguments.out)
        print(f"{name}: {row['perplexity']}, {row['core_minutes']} core minutes", flush=True)
    write_table(arguments.out)
    print((arguments.out / "table.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
