"""results.json and details.json: everything that is measured of the checkpoints that are there, by whichever run of `lbllm eval`.

A number is found by what it is of. What was made again, or is of another text than its name stands for now, is not there.
"""

from contextlib import suppress
from typing import Any

from lbllm_cli.core import model_folder
from lbllm_cli.core.errors import UsageError
from lbllm_cli.evaluation import tasks as lm_tasks
from lbllm_cli.evaluation.cache import Measurements
from lbllm_cli.evaluation.records import Named
from lbllm_cli.evaluation.sizes import Sizes, measure_sizes, result
from lbllm_cli.export import writer
from lbllm_cli.format.activations import ActivationFormat, format_of
from lbllm_cli.models.model import read_entries
from lbllm_cli.pipeline.checkpoint import Checkpoint, complete_stages
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.recipe.stages import BASE, EXPORT

# What is measured, by name; None: not a stage.
Checkpoints = dict[str, Checkpoint | None]


def identity(plan: Plan, name: str, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What a measurement of a checkpoint depends on, beside text or task. Raises UsageError as `writer.content`."""
    what: dict[str, Any] = {"model": plan.model.identity(), "dtype": str(plan.model.dtype)}
    if name == EXPORT:
        return {**what, "export": writer.content(plan.output / EXPORT)}
    if checkpoint is not None:
        what |= {"checkpoint": checkpoint.content, "activations": checkpoint.manifest.get("activations")}
    return what


def present(plan: Plan, asked: Checkpoints) -> Checkpoints:
    """All that may have been measured, in pipeline order. asked: by this run; of others those that are not damaged."""
    found: Checkpoints = {BASE: None}
    for name in (*complete_stages(plan.output), EXPORT):
        if name in asked:
            found[name] = asked[name]
            continue
        with suppress(UsageError, FileNotFoundError):
            checkpoint = None if name == EXPORT else Checkpoint(plan.output, name)
            identity(plan, name, checkpoint)
            _sizes(plan, name, checkpoint)
            found[name] = checkpoint
    return found


def tables(plan: Plan, known: Measurements, checkpoints: Checkpoints, named: Named) -> tuple[dict[str, Any], dict[str, Any]]:
    """What results.json says of some checkpoints, and what details.json says, on the texts and tasks that are named."""
    results, details = {}, {}
    for name, checkpoint in checkpoints.items():
        what = identity(plan, name, checkpoint)
        measured = {text: known.kept({**what, "text": tokens}) for text, tokens in named.texts.items()}
        scored = [known.kept({**what, **task.what}) or {} for task in named.tasks.values()]
        texts = {text: found for text, found in measured.items() if found is not None}
        flat = {line: values for found in scored for line, values in found.items()}
        flat |= lm_tasks.averages(named.groups, flat)
        results[name] = result(_sizes(plan, name, checkpoint), _format(plan, name, checkpoint), texts)
        results[name] |= {"tasks": flat} if flat else {}
        results[name] |= {} if checkpoint is None else {"checkpoint": checkpoint.content}
        details[name] = {
            text: {key: found[key] for key in ("positions", "blocks") if key in found} for text, found in texts.items()
        }
    return results, details


def _sizes(plan: Plan, name: str, checkpoint: Checkpoint | None) -> Sizes:
    model = plan.model
    if checkpoint is not None:
        entries = checkpoint.entries()
        return measure_sizes(model, entries, sum((checkpoint.path / file).stat().st_size for file in checkpoint.hashes))
    own = read_entries(plan.output / EXPORT, model.config) if name == EXPORT else None
    files_of = {entry.file for entry in (own or {key: model.entries[key] for key in model.shapes}).values()}
    return measure_sizes(model, own, sum(file.stat().st_size for file in files_of))


def _format(plan: Plan, name: str, checkpoint: Checkpoint | None) -> ActivationFormat | None:
    if name == EXPORT:
        return format_of(model_folder.read_config(plan.output / EXPORT).get("quantization_config") or {})
    return None if checkpoint is None else checkpoint.activations
