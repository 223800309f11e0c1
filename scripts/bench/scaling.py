#!/usr/bin/env python3
"""How long the stages of a large model take on 1, 8 and 64 H100s, and where more of them stop helping.

    python scripts/bench/scaling.py                                  LLaMA-2-7B and Llama 3 70B, a table in Markdown
    python scripts/bench/scaling.py --models llama2-7b --ranks 1 2 4 8 16 32 64 --cards 8
    python scripts/bench/scaling.py --step distill=0.42              a step of one rank as it was measured, in seconds
    python scripts/bench/scaling.py distill.end_to_end.train=[weights,levels]

Arithmetic, not a measurement: no GPU is needed, and nothing ran on one. What is computed is what `lbllm validate` forecasts for
one card, of which each rank has its share; bytes between ranks are those that a run counts. Gradients of weights go to their
owners while the last micro-batch is on its way back, weights come from them while the first is on its way forward, and both count
with what that does not hide; all else is waited for. Eight ranks to a machine, NVLink within, one network card of 400 Gb/s for
each machine between, unless --cards says more.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lbllm_cli.models.model import open_model
from lbllm_cli.pipeline.forecast import Place
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.traffic import ALL_REDUCE, BROADCAST, GATHER, OWNERS, REDUCE, stage_seconds
from lbllm_cli.pipeline.work import work_of
from lbllm_cli.pipeline.world import World
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.stages import StageSpec
from lbllm_cli.runtime.cards import CARDS
from lbllm_cli.runtime.links import FAST, NVLINK, Link

NODE, LENGTH, BATCH = 8, 2048, 64
# Shapes by name: of which one is made, and what differs.
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "llama2-7b": ("llama2-7b", {}),
    "llama3-70b": ("70b", {"vocab_size": 128256}),
}
CARD = CARDS["h100"]
# What ranks wait for, and what parts have that more ranks do not divide, in words.
WAITS = {
    REDUCE: "gradients within a machine, beyond the way back",
    BROADCAST: "weights broadcast within a machine",
    OWNERS: "gradients between machines",
    ALL_REDUCE: "sums over all ranks",
    GATHER: "packed weights and samples gathered",
}
UNDIVIDED = {
    "fits": "factorisations that every rank does, and units that one rank fits",
    "training steps": "the optimizer's step of the largest owner",
}
# Nothing is spread: every rank does it for all levels, or decodes all weights.
COPIES = "levels that every rank moves, weights that it decodes"


@dataclass(frozen=True)
class Estimate:
    """Of a stage on some ranks: seconds of its parts, and of what ranks wait for. limits: what holds the parts up."""

    parts: dict[str, float]
    waits: dict[str, float]
    limits: dict[str, str]

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        return sum(self.parts.values()) + sum(self.waits.values())


def recipe_of(folder: Path, sequences: int) -> Path:
    """A recipe for the folder's model: a batch of 64 sequences, an end-to-end phase after distill on as much text."""
    text = {"source": "builtin:calibration", "length": LENGTH}
    step = {"batch_size": BATCH, "micro_batch_size": 1}
    whole = {**step, "sequences": sequences, "recompute": "always"}
    recipe = {
        "model": {"path": str(folder), "dtype": "bfloat16"}, "output": {"dir": str(folder / "run")},
        "runtime": {"device": "cpu"},
        "data": {
            "calibration": {**text, "sequences": 128},
            "training": {**text, "sequences": sequences},
            "evaluation": [{"name": "novels", "source": "builtin:evaluation/novels", "length": LENGTH, "segments": 2}],
        },
        "ptq": {"group_size": 128}, "distill": {**step, "end_to_end": whole}, "act_calib": step,
    }  # fmt: skip
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def place_of(plan: Plan, spec: StageSpec) -> Place:
    """Where hidden states lie: on the card where they take half of it at most, else in RAM; a phase keeps them on disk."""
    if spec.end_to_end:
        return "disk"
    text = plan.token_set(spec)
    one = plan.world.most(text.sequences) * text.length * int(plan.model.config.hidden_size) * plan.model.dtype.itemsize
    return "device" if spec.streams[1] * one <= CARD.memory / 2 else "ram"


def estimate(plan: Plan, spec: StageSpec, between: Link, measured: float | None) -> Estimate:
    """Of a stage on a plan's ranks. measured: seconds of an optimizer step of one rank by itself, for arithmetic's."""
    work, place = work_of(spec), place_of(plan, spec)
    exchanged, parts = work.exchanged(plan, spec), work.work(plan, spec)
    if measured is not None and exchanged.steps:
        alone = replace(plan, asked=World())
        whole = work.work(alone, spec)[0].seconds(CARD, place_of(alone, spec))
        factor = measured * exchanged.blocks * exchanged.steps / whole
        first = parts[0]
        parts[0] = replace(
            first, products=first.products * factor, passed=first.passed * factor, launches=first.launches * factor
        )  # fmt: skip
    terms = stage_seconds(parts, exchanged, plan.world, CARD, place, (NVLINK, between))
    names = {part.name for part in parts}
    return Estimate(
        {name: seconds for name, seconds in terms.items() if name in names},
        {name: seconds for name, seconds in terms.items() if name not in names},
        {part.name: part.limit(CARD, place) for part in parts},
    )


def losses(alone: Estimate, found: Estimate, ranks: int, spread: bool) -> dict[str, float]:
    """Seconds beyond a `ranks`-th of what one rank takes, by cause."""
    lost = {WAITS.get(name, name): seconds for name, seconds in found.waits.items()}
    for name, seconds in found.parts.items():
        if (more := seconds - alone.parts[name] / ranks) > 0:
            cause = UNDIVIDED.get(name, name) if spread or name == "fits" else COPIES
            limit = found.limits[name]
            lost[f"{limit}, in {name}" if limit in ("launches", "copies of hidden states") else cause] = more
    return lost


def rows_of(model: str, folder: Path, arguments: argparse.Namespace) -> list[list[str]]:
    """Lines of the table for a model, one for each stage."""
    from random_models import config_of

    shape, changes = MODELS[model]
    config_of(shape, **changes).save_pretrained(folder)
    recipe = load_recipe(recipe_of(folder, arguments.sequences), arguments.changes)
    source = open_model(recipe.model, torch.device("cpu"), weights=False)
    between = replace(FAST, cards=arguments.cards)
    rows = []
    for spec in recipe.stages:
        measured = dict(arguments.step).get(spec.name)
        found = {}
        for ranks in sorted({1, *arguments.ranks, *(2**power for power in range(BATCH.bit_length()))}):
            plan = Plan(recipe, folder / "run", source, None, asked=World(ranks, min(ranks, NODE)))
            found[ranks] = estimate(plan, spec, between, measured)
        speed = {ranks: found[1].seconds / one.seconds for ranks, one in found.items()}
        cells = [f"{_hours(found[ranks].seconds)} ({speed[ranks]:.1f}x)" for ranks in arguments.ranks]
        # As long as twice as many ranks are at least half again as fast.
        last = next((ranks for ranks in (1, 2, 4, 8, 16, 32) if speed[2 * ranks] < 1.5 * speed[ranks]), None)
        most = max(arguments.ranks)
        spread = "weights" in getattr(plan.settings(spec), "trained", ())
        lost = sorted(losses(found[1], found[most], most, spread).items(), key=lambda pair: -pair[1])[:2]
        why = "; ".join(f"{cause} ({seconds / found[most].seconds:.0%})" for cause, seconds in lost)
        rows.append([model, spec.name, *cells, f"not below {BATCH}" if last is None else str(last), why or "nothing"])
    return rows


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _step(text: str) -> tuple[str, float]:
    stage, _, seconds = text.partition("=")
    return stage, float(seconds)


def main() -> None:
    """Prints the table."""
    sys.path.insert(0, str(Path(__file__).parent))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 8, 64], help=f"{BATCH} at most: each has one in every step")
    parser.add_argument("--sequences", type=int, default=8192, help=f"of {LENGTH} tokens that are trained on")
    parser.add_argument("--cards", type=int, default=1, help="network cards of 400 Gb/s that a machine has")
    parser.add_argument("--step", nargs="+", type=_step, default=[], metavar="STAGE=SECONDS", help="measured steps of one rank")
    arguments = parser.parse_args()
    if any(not 1 <= ranks <= BATCH or ranks % min(ranks, NODE) for ranks in arguments.ranks):
        parser.error(f"--ranks: 1 to {BATCH}, and above {NODE} multiples of it")
    tokens = arguments.sequences * LENGTH / 1e6
    print(
        f"Arithmetic, not a measurement: {CARD.name}s, {NODE} to a machine, NVLink within, {arguments.cards} x 400 Gb/s between; "
        f"{tokens:.1f} million training tokens, {BATCH} sequences in a step.\n"
    )
    header = ["model", "stage", *(f"{ranks} GPU{'s' * (ranks > 1)}" for ranks in arguments.ranks)]
    header += ["scales up to", f"what is lost on {max(arguments.ranks)}, share of the time"]
    rows: list[list[Any]] = [header, ["---"] * len(header)]
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(model, Path(folder), arguments)
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(
        f"\nMore than {BATCH} ranks are refused: each has a sequence in every step. Hidden states lie on a card where those of "
        "its rank take half of it at most, else in RAM:\nthat is why 8 can be more than 8 times as fast."
    )


if __name__ == "__main__":
    main()
