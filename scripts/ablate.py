#!/usr/bin/env python3
"""Runs variants of a stage on one recipe and writes one table: perplexity per text, and time of the stage.

    python scripts/ablate.py --recipe recipes/smollm2-135m.yaml --stage distill --out runs/distill [--only NAME ...]

Every variant is a run folder of its own, so a stopped script goes on where it was, and finished variants cost nothing; variants
of a later stage start from one checkpoint of the stages before it per group size. The table (table.md, table.json) is written
again after every variant, and tokens.png once there are variants that differ in tokens alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.stages import STAGES, TABLE, StageSpec

PTQ: dict[str, list[str]] = {
    "default": [],
    "group 128": ["ptq.group_size=128"],
    "levels of 4 bits": ["ptq.level_bits=4"],
    "calibrated on novels": ["data.calibration.source=builtin:calibration/novels"],
    "calibrated on generate:": ["data.calibration.source=generate:"],
    "calibrated on both halves": ['data.calibration.source=["builtin:calibration", "generate:"]'],
    "calibrated on three parts and one": [
        'data.calibration.source=[{source: "builtin:calibration", weight: 3}, {source: "generate:", weight: 1}]'
    ],
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
BITMAP = "distill.parametrisation=bitmap"
DISTILL: dict[str, list[str]] = {
    "default": [],
    "no stage 2": ["distill.epochs=0"],
    "nearest, levels": ["distill.train=[levels]"],
    "nearest, weights": ["distill.train=[weights]"],
    "bitmap, levels": [BITMAP, "distill.train=[levels]"],
    "bitmap, levels and bitmap": [BITMAP, "distill.train=[levels, bitmap]"],
    "bitmap, levels and weights": [BITMAP, "distill.train=[levels, weights]"],
    "bitmap, all": [BITMAP],
    "bitmap, all, not polarised": [BITMAP, "distill.polarise=0"],
    "plain loss": ["distill.loss=plain"],
    "mixed loss": ["distill.loss=mixed"],
    "no dampening": ["distill.dampening=0"],
    "latents at the cell's edge": ["distill.latent_margin=0"],
    "latents on their level": ["distill.latent_margin=1"],
    "half the rates": ["distill.lr_weights=0.01", "distill.lr_levels=0.005"],
    "twice the rates": ["distill.lr_weights=0.04", "distill.lr_levels=0.02"],
    "32 sequences": ["data.training.sequences=32"],
    "64 sequences": ["data.training.sequences=64"],
    "128 sequences": ["data.training.sequences=128"],
    "256 sequences": ["data.training.sequences=256"],
    "group 128": ["ptq.group_size=128"],
}
JOINT = "act_calib.train=[weights, levels, clip_factors, knees]"
ACT_CALIB: dict[str, list[str]] = {
    "default": [],
    "nothing trained": ["act_calib.epochs=0"],
    "levels alone": ["act_calib.train=[levels]"],
    "fixed knees": ["act_calib.train=[levels, clip_factors]"],
    "fixed clipping factors": ["act_calib.train=[levels, knees]"],
    "quantizers alone": ["act_calib.train=[clip_factors, knees]"],
    "no soft knees": ["act_calib.soft=0"],
    "one table": ["act_calib.tables=1"],
    "one table, nothing trained": ["act_calib.tables=1", "act_calib.epochs=0"],
    "uniform": ["act_calib.form=uniform", "act_calib.kv_form=uniform"],
    "uniform, nothing trained": ["act_calib.form=uniform", "act_calib.kv_form=uniform", "act_calib.epochs=0"],
    "uniform keys and values": ["act_calib.kv_form=uniform"],
    "per token": ["act_calib.granularity=token"],
    "per token, nothing trained": ["act_calib.granularity=token", "act_calib.epochs=0"],
    "8-bit keys and values": ["act_calib.kv_bits=8"],
    "8-bit activations": ["act_calib.bits=8"],
    "twice the rates": ["act_calib.lr_levels=0.01", "act_calib.lr_clip_factors=0.01", "act_calib.lr_knees=0.02"],
    "half the rates": ["act_calib.lr_levels=0.0025", "act_calib.lr_clip_factors=0.0025", "act_calib.lr_knees=0.005"],
    "weights as well": [JOINT],
    "ptq, then act-calib": ["act_calib.parent=ptq"],
    "ptq, then jointly": ["act_calib.parent=ptq", JOINT, "act_calib.epochs=2"],
    "group 128": ["ptq.group_size=128"],
}
# Of both end-to-end phases; {} is the recipe's section. Other text has another teacher's states than a folder that it names.
END_TO_END: dict[str, list[str]] = {
    "default": [],
    "levels": ["{}.train=[levels]"],
    "scales": ["{}.train=[scales]"],
    "norms": ["{}.train=[norms]"],
    "scales and norms": ["{}.train=[scales, norms]"],
    "codes, levels and norms": ["{}.train=[weights, levels, norms]"],
    "next token": ["{}.next_token=1"],
    "half next token": ["{}.next_token=0.5"],
    "temperature 2": ["{}.temperature=2"],
    "three times the rates": ["{}.lr_levels=3e-3", "{}.lr_norms=3e-3"],
    "a third of the rates": ["{}.lr_levels=3e-4", "{}.lr_norms=3e-4"],
    "32 sequences": ["{}.sequences=32", "{}.teacher=null"],
    "64 sequences": ["{}.sequences=64", "{}.teacher=null"],
    "256 sequences": ["{}.sequences=256", "{}.teacher=null"],
    "512 sequences": ["{}.sequences=512", "{}.teacher=null"],
    "sampled text": ["{}.source=generate:", "{}.teacher=null"],
    "group 128": ["ptq.group_size=128"],
}
VARIANTS = {"ptq": PTQ, "distill": DISTILL, "act-calib": ACT_CALIB} | {
    spec.name: {name: [key.format(spec.section) for key in keys] for name, keys in END_TO_END.items()}
    for spec in TABLE
    if spec.end_to_end
}
VARIANTS["distill-e2e"]["after ptq"] = ["distill.epochs=0"]


def lbllm(name: str, *arguments: str) -> None:
    """The command of a stage, or another by its name; its failure ends the script with the command's own message."""
    own = STAGES[name].own_command.split() if name in STAGES else [name]
    command = [sys.executable, "-m", "lbllm_cli", *own, *arguments]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        sys.exit(code)


def folder_of(out: Path, name: str) -> Path:
    """Run folder of a variant."""
    return out / "".join(letter if letter.isalnum() else "-" for letter in name)


def parents_of(stage: str, recipe: str, overrides: list[str]) -> list[StageSpec]:
    """The stages before a variant's; an end-to-end phase only where the recipe or the keys ask for one."""
    resolved = load_recipe(Path(recipe), overrides)
    return [spec for spec in TABLE[: TABLE.index(STAGES[stage])] if spec in resolved.stages]


def give_parents(stage: str, recipe: str, out: Path, folder: Path, overrides: list[str]) -> None:
    """Puts the finished stages that a variant starts from into its folder; they depend on their own sections' keys alone."""
    parents = parents_of(stage, recipe, overrides)
    sections = tuple(f"{spec.section}." for spec in parents)
    left_out = tuple(f"{spec.section}" for spec in TABLE if spec.end_to_end and spec not in parents)
    keys = [key for key in overrides if key.startswith(sections) and not key.startswith(left_out)]
    made = folder_of(out, " ".join(["parent", *keys]))
    for name in (spec.name for spec in parents):
        if (folder / name).exists():
            continue
        # A finished parent is not asked whether it is up to date: that takes as long as a toy's training.
        if not (made / name / "lbllm_stage.json").exists():
            lbllm(name, "--recipe", recipe, f"output.dir={made}", *overrides)
        unfinished = folder / f"{name}.copy"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(made / name, unfinished)
        unfinished.rename(folder / name)


def measure(stage: str, recipe: str, out: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """Runs one variant, or finds it finished: its perplexities, and the tokens and seconds that its blocks took."""
    folder = folder_of(out, name)
    give_parents(stage, recipe, out, folder, overrides)
    lbllm(stage, "--recipe", recipe, f"output.dir={folder}", *overrides)
    results = folder / "eval" / "results.json"
    if not results.exists():
        lbllm("eval", "--recipe", recipe, f"output.dir={folder}", *overrides, f"eval.checkpoints=[{stage}]")
    events = (folder / stage / "events.jsonl").read_text(encoding="utf-8").splitlines()
    records = [event for event in map(json.loads, events) if "seconds" in event]
    seconds = {event.get("block", event.get("step")): event["seconds"] for event in records}
    tokens = json.loads((folder / stage / "lbllm_stage.json").read_text(encoding="utf-8"))["tokens"]
    measured = json.loads(results.read_text(encoding="utf-8"))[stage]
    return {**measured, "tokens": tokens, "seconds": round(sum(seconds.values()))}


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
    lines = [f"| variant | {' | '.join(base)} | bits per weight | tokens | seconds |", "|---|" + "---:|" * (len(base) + 3)]
    for name, row in rows.items():
        cells = [f"{row['perplexity'][text]:.2f} ({row['perplexity'][text] / base[text]:.2f}x)" for text in base]
        rest = f"{row['bits_per_weight']:.3f} | {row.get('tokens', '')} | {row.get('seconds', '')}"
        lines.append(f"| {name} | {' | '.join(cells)} | {rest} |")
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot_tokens(out: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Perplexity over full precision against training tokens, from the variants that differ in sequences alone."""
    from matplotlib.figure import Figure

    found = sorted((row for name, row in rows.items() if name.endswith(" sequences")), key=lambda row: row["tokens"])
    if len(found) < 2:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for text, base in rows["full precision"]["perplexity"].items():
        axes.plot([row["tokens"] for row in found], [row["perplexity"][text] / base for row in found], "o-", label=text)
    axes.set(xlabel="training tokens", ylabel="perplexity, times full precision", xscale="log")
    axes.set_xticks([row["tokens"] for row in found], [f"{row['tokens'] // 1024}k" for row in found], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "tokens.png", dpi=120)


def main() -> None:
    """Reads the arguments and runs the variants in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--stage", choices=VARIANTS, default="ptq")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants to run; default all of the stage")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys that all variants share")
    parser.add_argument("--segments", type=int, default=12, help="evaluation segments per style")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a segment")
    arguments = parser.parse_intermixed_args()
    variants = VARIANTS[arguments.stage]
    # Keys may follow the names: what holds an equals sign is no name.
    arguments.overrides += [word for word in arguments.only or () if "=" in word]
    only = [word for word in arguments.only or () if "=" not in word] or list(variants)
    if unknown := set(only) - set(variants):
        parser.error(f"no such variant: {', '.join(sorted(unknown))}; there are: {', '.join(variants)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    sets = [
        {"name": style, "source": f"builtin:evaluation/{style}", "length": arguments.length, "segments": arguments.segments}
        for style in ("novels", "technical", "modern")
    ]
    if load_recipe(Path(arguments.recipe), arguments.overrides).data.calibration.bos:
        sets = [{**item, "bos": True} for item in sets]
    common = [f"data.evaluation={json.dumps(sets)}"]
    common += arguments.overrides
    settings = {"stage": arguments.stage, "common": common}
    record = arguments.out / "settings.json"
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) != settings:
        sys.exit(f"{arguments.out} holds a table of another stage, other texts or other keys; choose another --out")
    record.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    rows = {"full precision": base_perplexity(arguments.recipe, arguments.out / "base", common)}
    for name in only:
        rows[name] = measure(arguments.stage, arguments.recipe, arguments.out, name, [*common, *variants[name]])
        write_table(arguments.out, rows)
        plot_tokens(arguments.out, rows)
        print(f"{name}: {rows[name]['perplexity']}, {rows[name]['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
