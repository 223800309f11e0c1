"""`lbllm report`: what is known of a run, on one page."""

from pathlib import Path

import torch

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import RunError, UsageError
from lbllm_cli.data import sources
from lbllm_cli.data.tokens import evaluation_tokens
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.drawing import Image
from lbllm_cli.pipeline.lineage import open_checkpoint
from lbllm_cli.pipeline.output import check_output, output_folder
from lbllm_cli.pipeline.plan import Plan, prepare
from lbllm_cli.recipe.load import dump_recipe
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import BASE, STAGES, TABLE
from lbllm_cli.report import figures, page
from lbllm_cli.report.distributions import Linear, input_histograms, weight_histogram, worst_linears
from lbllm_cli.report.page import Figure, Page, Section
from lbllm_cli.report.records import Run, read_run
from lbllm_cli.report.tables import linears_table, outcome, ratios, results_table, stages_table
from lbllm_cli.training import plots

_WORST = 4
# Enough values for a histogram, and little work: the blocks before the last one wanted run once over it.
_TOKENS = 256


@torch.no_grad()
def report(recipe: Recipe) -> None:
    """`lbllm report`."""
    output = output_folder(recipe)
    _check_own(output)
    run = read_run(output)
    for message in run.unreadable.values():
        say(f"report: warning: {message}")
    plan: Plan | None = None
    try:
        plan, missing = prepare(recipe), ""
    except UsageError as error:
        # What the model is needed for is left out; the records alone are worth a page.
        missing = str(error)
    sections = [_results(run), _stages(run, plan), *_worst(run, plan, missing), _settings(run, recipe)]
    whole = Page(f"Run {output.resolve().name}", _facts(run, recipe), sections)
    pages = {"html": page.to_html(whole), "md": page.to_markdown(whole)}
    with interrupt.graceful():
        for kind, text in pages.items():
            # A recipe or a path may hold half a surrogate pair, which no encoding has.
            files.write_text(output / f"report.{kind}", text.encode("utf-8", "replace").decode("utf-8"))
    say(f"report: {output / 'report.html'}, {(output / 'report.html').stat().st_size:,} bytes, and report.md beside it")


def _check_own(output: Path) -> None:
    """Raises UsageError where the files to be written are there and somebody else's, or cannot be written."""
    check_output(output, None)
    for name, mark in (("report.html", b"<title>Run "), ("report.md", b"# Run ")):
        path = output / name
        if path.exists():
            with path.open("rb") as handle:
                if mark not in handle.read(500):
                    raise UsageError(f"{path} is not of `lbllm report`, which writes one there; move it away")


def _facts(run: Run, recipe: Recipe) -> list[tuple[str, str]]:
    """The head of the page."""
    facts = [("model", recipe.model.path), ("folder", str(run.output)), ("stages", ", ".join(run.stages) or "none")]
    if not run.complete:
        return facts
    name, checkpoint = list(run.complete.items())[-1]
    manifest, result = checkpoint.manifest, outcome(run, name)
    share = manifest["binarized_parameters"] / manifest["parameters"]
    facts.append(("size", f"{manifest['blocks']} blocks, {manifest['parameters']:,} parameters, {share:.1%} of them binarized"))
    return facts if result is None else [*facts, ("outcome", result)]


def _results(run: Run) -> Section:
    section = Section("Results")
    if not run.results:
        section.notes.append("Nothing is measured yet. Run `lbllm eval --recipe ...`.")
        return section
    for name in run.outdated():
        section.remarks.append(
            f"The numbers of {name} are older than the {name} that is in the folder now, or an older lbllm measured them: `eval` "
            "has kept no measurement of this checkpoint with these numbers. Run `lbllm eval --recipe ...`."
        )
    unmeasured = [name for name in (BASE, *run.complete) if name not in run.results]
    if unmeasured:
        section.remarks.append(f"Not measured yet: {', '.join(unmeasured)}. Run `lbllm eval --recipe ...`.")
    section.table = results_table(run.results)
    section.notes.append(
        "Perplexity, with how many times base's in brackets, and KL divergence: lower is better. Agreement and scores: higher is "
        "better, ± one standard error. Bits per weight count the binarized linears, bits per parameter the whole model."
    )
    section.figures = _result_figures(run)
    if not run.details:
        section.notes.append("Errors along the depth and by position are not recorded. Run `lbllm eval --recipe ...`.")
    return section


def _result_figures(run: Run) -> list[Figure]:
    drawn = []
    over = ratios(run.results)
    if over:
        caption = (
            "Left is better; the line at 1 is base. One text far to the right of the others: the calibration text did not "
            "resemble it."
        )
        drawn.append(Figure("Perplexity over base", [figures.perplexity_ratios(over)], caption))
    decibels = {
        name: [[block["decibels"] for block in found["blocks"]] for found in texts.values() if found.get("blocks")]
        for name, texts in run.details.items()
    }
    decibels = {name: columns for name, columns in decibels.items() if columns}
    if decibels:
        caption = (
            "Energy of the base model's hidden states over the energy of the difference from them, ordinary tokens only. The "
            "line is the mean over the texts, the band goes from the worst text to the best. Higher is better. A slow fall is "
            "errors adding up; a step down names a block to look at."
        )
        drawn.append(Figure("Signal to noise along the depth", [figures.signal_to_noise(decibels)], caption))
    images = []
    for text in run.texts():
        found = {name: texts[text]["positions"] for name, texts in run.details.items() if "positions" in texts.get(text, {})}
        images += [figures.perplexity_by_position(text, found)] if found else []
    if images:
        caption = (
            "Perplexity of tokens by the length of the context they have, in ranges that double; the first prediction, made from "
            "one token alone, is left out. A gap to base that widens to the right: the checkpoint makes less of a long context. "
            "Both axes are logarithmic, so equal gaps are equal ratios."
        )
        drawn.append(Figure("Perplexity by position", images, caption))
    return drawn


def _stages(run: Run, plan: Plan | None) -> Section:
    section = Section("Stages")
    section.remarks += [f"{stage}: {message}" for stage, message in run.unreadable.items()]
    section.notes += [
        f"{spec} is not there; it is made by `lbllm {spec.command} --recipe ...`."
        for spec in TABLE
        if spec.name not in run.stages and spec.name not in run.unreadable and not spec.end_to_end
    ]
    section.notes += [
        f"{stage} is unfinished, {record.done} blocks are done; `lbllm {STAGES[stage].command} --recipe ...` goes on."
        for stage, record in run.stages.items()
        if record.checkpoint is None
    ]
    section.notes += [
        f"{stage} is being made again, {done} blocks are done; `lbllm {STAGES[stage].command} --recipe ...` goes on."
        for stage, done in run.again.items()
    ]
    if run.stages:
        section.table = stages_table(run, None if plan is None else plan.model)
    images: list[Image] = []
    for stage, record in run.stages.items():
        records = [found for found in record.blocks if "before" in found]
        images += [plots.held_out_errors(stage, records)] if records else []
        images += [plots.last_losses(stage, records)] if any(found["epochs"] for found in records) else []
        images += [plots.step_losses(stage, record.steps)] if record.steps else []
    if images:
        caption = (
            "Errors: solid below dashed is what training gained in that block; where they meet, it was returned as it began. The "
            "two colours part in blocks that a few massive tokens dominate. Losses are relative to the error at the start, the "
            "line at 1; training far below held out is overfitting, for which more sequences help. A phase over the whole "
            "model has one loss, over its tokens."
        )
        section.figures.append(Figure("Training", images, caption))
    return section


def _worst(run: Run, plan: Plan | None, missing: str) -> list[Section]:
    """The linears with the largest errors: their weights, and what they read. missing: why there is no plan."""
    first = TABLE[0].name
    worst = worst_linears(run.stages[first].blocks, _WORST) if first in run.complete else []
    if not worst:
        return []
    section = Section("Linears with the largest errors", table=linears_table(worst))
    if plan is None:
        section.notes.append(f"Their weights and inputs are not drawn: {missing}")
        return [section]
    try:
        last = open_checkpoint(plan, list(run.complete)[-1])
        # Names are those of a log that anybody may have edited.
        worst = [linear for linear in worst if linear.name in plan.model.linears]
        section.figures.append(_weights(plan, last, worst))
        if last.activations is not None:
            section.figures.append(_inputs(plan, last, worst))
    except (UsageError, RunError) as error:
        section.notes.append(f"Not drawn: {error}")
    return [section]


def _weights(plan: Plan, checkpoint: Checkpoint, worst: list[Linear]) -> Figure:
    found = [weight_histogram(plan.model, checkpoint, linear) for linear in worst]
    images = [figures.weight_distribution(histogram, checkpoint.stage) for histogram in found]
    caption = (
        f"The line is the source; filled is what the codes of {checkpoint.stage} stand for: four levels per "
        f"group of {checkpoint.record.weights[0]} weights, so that a hump is one level over all groups. Look for tails of "
        "the source that no level reaches, and for a hump that is missing: a level that is not used."
    )
    return Figure("Their weights, source and binarized", images, caption)


def _inputs(plan: Plan, checkpoint: Checkpoint, worst: list[Linear]) -> Figure:
    spec = plan.recipe.data.evaluation[0]
    # No stage has looked at them.
    for item in spec.source:
        sources.check(item, evaluating=True)
    tokens = evaluation_tokens(spec.model_copy(update={"segments": 1}), plan.tokenizer, plan.vocab)[:, :_TOKENS]
    found = input_histograms(plan.model, checkpoint, tokens, worst)
    images = [figures.input_distribution(histogram, checkpoint.stage) for histogram in found]
    caption = (
        f"Inputs on the first {tokens.shape[1]} tokens of {spec.name}, in steps of their groups. The line is the share of values "
        "per step; vertical lines are the levels of the table that the groups took, and a marker on one is the share of values "
        "that got its code. Look for codes that hardly any value gets, and for values beyond the outermost levels: they are "
        "clipped."
    )
    return Figure("Their inputs, with the levels of the quantizers", images, caption)


def _settings(run: Run, recipe: Recipe) -> Section:
    """The recipe that the last stage ran with, and where each stage ran."""
    section = Section("Recipe and environments")
    resolved = [(stage, text) for stage, record in run.stages.items() if (text := record.text("recipe.resolved.yaml"))]
    title, text = (f"Recipe that {resolved[-1][0]} ran with", resolved[-1][1]) if resolved else ("Recipe", dump_recipe(recipe))
    section.details.append((title, text))
    for stage, record in run.stages.items():
        if environment := record.text("environment.json"):
            section.details.append((f"Environment of {stage}", environment))
    return section
