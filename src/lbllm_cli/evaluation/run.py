"""One run of `lbllm eval` in its output folder: what is known already, and what is still to be measured."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm_cli.core import files, interrupt, model_folder
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import LbllmError, RunError, UsageError
from lbllm_cli.core.own_folders import remove_own
from lbllm_cli.data.tokens import tokens_hash
from lbllm_cli.evaluation import tasks as lm_tasks
from lbllm_cli.evaluation.cache import Measurements
from lbllm_cli.evaluation.perplexity import Evaluation, whole_perplexity
from lbllm_cli.evaluation.sizes import Sizes, measure_sizes, result
from lbllm_cli.export import writer
from lbllm_cli.export.base import Form
from lbllm_cli.export.card import Described
from lbllm_cli.format.activations import format_of
from lbllm_cli.models.model import read_entries
from lbllm_cli.pipeline.checkpoint import Checkpoint, complete_stages
from lbllm_cli.pipeline.folders import EVAL_STREAMS, EXPORT_FOLDER
from lbllm_cli.pipeline.forecast import Place
from lbllm_cli.pipeline.lineage import open_checkpoint
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.reporter import Reporter
from lbllm_cli.recipe.stages import BASE, EXPORT, USUAL_FORMAT


def wanted_checkpoints(plan: Plan) -> dict[str, Checkpoint | None]:
    """What is measured, by name; every checkpoint belongs to this model and is unchanged. None: not a stage."""
    names: list[str] = list(plan.recipe.eval.checkpoints or []) or [BASE, *complete_stages(plan.output)]
    if EXPORT in names and not (plan.output / EXPORT / writer.RECORD).exists():
        raise UsageError(f"eval.checkpoints: there is no export in {plan.output}; run: lbllm export --recipe ...")
    if EXPORT in names:
        if any((plan.output / EXPORT).glob("*.gguf")):
            raise UsageError("eval.checkpoints: the export is a gguf file, which llama.cpp measures; measure the stage itself")
        writer.verify(plan.output / EXPORT)
    return {name: None if name in (BASE, EXPORT) else open_checkpoint(plan, name) for name in names}


class EvaluationRun:
    """One run of the command in its output folder."""

    def __init__(self, plan: Plan, checkpoints: dict[str, Checkpoint | None], place: Place, fresh: bool):
        self.plan = plan
        self.checkpoints = checkpoints
        self.folder = plan.output / "eval"
        self.streams = self.folder / "streams" if place == "disk" else None
        self.place = place
        self.known = Measurements(self.folder / "measured", fresh)
        # What could not be measured, by checkpoint and text.
        self.failed: list[tuple[str, str]] = []
        (self.streams or self.folder).mkdir(parents=True, exist_ok=True)

    def results(self, sets: dict[str, Tensor], tasks: list[lm_tasks.Task]) -> dict[str, Any] | None:
        """results.json, and details.json with what is not for a table; everything measured is kept as it comes.

        Of several ranks the first one has them, and alone measures what needs a model that is whole in memory; None of others.
        """
        self._compare(sets)
        if not self.plan.group.first:
            return None
        texts = self._texts(sets)
        scores = {name: self._scores(name, tasks) for name in self.checkpoints}
        results, details = {}, {}
        for name in self.checkpoints:
            flat = {task: values for found in scores[name].values() for task, values in found.items()}
            flat |= lm_tasks.averages(self.plan.recipe.eval.tasks, flat)
            results[name] = result(self._sizes(name), self._format(name), texts[name])
            results[name] |= {"tasks": flat} if flat else {}
            if (checkpoint := self.checkpoints[name]) is not None:
                results[name]["checkpoint"] = checkpoint.content
            details[name] = {
                text: {key: found[key] for key in ("positions", "blocks") if key in found} for text, found in texts[name].items()
            }
        files.write_json(self.folder / "details.json", details)
        files.write_json(self.folder / "results.json", results)
        remove_own(self.folder / "streams", EVAL_STREAMS)
        return results

    def _identity(self, name: str) -> dict[str, Any]:
        """What a measurement of a checkpoint depends on, beside text or task."""
        checkpoint, model = self.checkpoints[name], self.plan.model
        what: dict[str, Any] = {"model": model.identity(), "dtype": str(model.dtype)}
        if name == EXPORT:
            return {**what, "export": writer.content(self.plan.output / EXPORT)}
        if checkpoint is not None:
            what |= {"checkpoint": checkpoint.content, "activations": checkpoint.manifest.get("activations")}
        return what

    def _whats(self, sets: dict[str, Tensor]) -> dict[tuple[str, str], dict[str, Any]]:
        """What each measurement of a checkpoint on a text depends on."""
        return {
            (name, text): {**self._identity(name), "text": tokens_hash(tokens)}
            for name in self.checkpoints
            for text, tokens in sets.items()
        }

    def _compare(self, sets: dict[str, Tensor]) -> None:
        """Measures stages beside the base model, on what was not measured before; all ranks together."""
        whats, group = self._whats(sets), self.plan.group
        missing = group.told(lambda: [key for key, what in whats.items() if self.known.get(what) is None])
        wanted = {text: [name for name, other in missing if other == text and name != EXPORT] for text in sets}
        if any(wanted.values()):
            measured = {name for names in wanted.values() for name in names}
            stages = {name: found for name, found in self.checkpoints.items() if found is not None and name in measured}
            run = Evaluation(self.plan.model, stages, self.plan.recipe.runtime.batch_size, self.streams, self.place, group)
            with Reporter("eval", self.plan.model, group=group) as reporter:
                found = run.run({text: sets[text] for text in sets if wanted[text]}, wanted, reporter)
                reporter.note(f"{', '.join([BASE, *stages])}: finished in {reporter.used()}")
            for key, values in found.items():
                if values is None or key in whats:
                    self._keep(key, whats, None if values is None else values.as_dict())

    def _texts(self, sets: dict[str, Tensor]) -> dict[str, dict[str, dict[str, Any]]]:
        """name -> text -> `Measured.as_dict()`."""
        whats = self._whats(sets)
        missing = [text for (name, text), what in whats.items() if name == EXPORT and self.known.get(what) is None]
        self._export_texts({text: sets[text] for text in missing}, whats)
        kept = {key: self.known.get(what) for key, what in whats.items()}
        return {name: {text: value for text in sets if (value := kept[name, text])} for name in self.checkpoints}

    def _keep(self, key: tuple[str, str], whats: dict[tuple[str, str], dict[str, Any]], found: dict[str, Any] | None) -> None:
        """Keeps what was measured, or that it could not be."""
        if found is None:
            self.failed.append(key)
        elif self.plan.group.first:
            self.known.put(whats[key], found)

    def _export_texts(self, sets: dict[str, Tensor], whats: dict[tuple[str, str], dict[str, Any]]) -> None:
        if not sets:
            return
        lm = self._open(self.plan.output / EXPORT)
        for text, tokens in sets.items():
            found = whole_perplexity(lm.model, tokens, self.plan.model.device)
            self._keep((EXPORT, text), whats, None if found is None else {"perplexity": found})

    def _open(self, folder: Path) -> Any:
        recipe, model = self.plan.recipe, self.plan.model
        return lm_tasks.open_lm(folder, model.dtype, model.device, recipe.eval.batch_size, recipe.model.trust_remote_code)

    def _scores(self, name: str, tasks: list[lm_tasks.Task]) -> dict[str, dict[str, Any]]:
        """task -> its flat scores; a model is opened only where one is missing."""
        limit = self.plan.recipe.eval.limit
        whats = {
            task.name: {**self._identity(name), "task": task.identity, "num_fewshot": task.num_fewshot, "limit": limit,
                        "lm-eval": lm_tasks.version()}
            for task in tasks
        }  # fmt: skip
        missing = [task for task in tasks if self.known.get(whats[task.name]) is None]
        if missing:
            folder, temporary = self._model_folder(name)
            try:
                lm = self._open(folder)
                # A task may take hours; a signal stops it between two forward passes.
                lm.model.register_forward_pre_hook(lambda *_: interrupt.check())
                for task in missing:
                    say(f"eval: {name}, {task.name}")
                    found = self._score(name, lm, task, limit)
                    self.known.put(whats[task.name], lm_tasks.scores(found, task.name))
            finally:
                if temporary:
                    remove_own(folder, EXPORT_FOLDER)
        return {task.name: self.known.get(whats[task.name]) or {} for task in tasks}

    def _score(self, name: str, lm: Any, task: lm_tasks.Task, limit: float | None) -> dict[str, Any]:
        try:
            found = lm_tasks.run_task(lm, task, limit)
        except (LbllmError, KeyboardInterrupt, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a task's own code may raise anything
            raise RunError(
                f"eval: {task.name} failed on {name}: {type(error).__name__}: {error}\n"
                "What was measured before is kept; mend the task, or take it out of eval.tasks, and run the same command again"
            ) from error
        folder = self.folder / "lm-eval" / name
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / f"{task.name}.json", found)
        return found

    def _model_folder(self, name: str) -> tuple[Path, bool]:
        """A folder that transformers loads, and whether it is to be deleted afterwards."""
        checkpoint = self.checkpoints[name]
        if checkpoint is None:
            return (self.plan.output / EXPORT if name == EXPORT else self.plan.model.folder), False
        folder, recipe = self.folder / f"{name}.model", self.plan.recipe
        form = Form(USUAL_FORMAT, int(recipe.export.shard_gb * 1e9))
        writer.export(self.plan.model, checkpoint, folder, form, Described(recipe.model.path))
        return folder, True

    def _sizes(self, name: str) -> Sizes:
        checkpoint, model = self.checkpoints[name], self.plan.model
        if checkpoint is not None:
            size = sum((checkpoint.path / file).stat().st_size for file in checkpoint.hashes)
            return measure_sizes(model, checkpoint.entries(), size)
        entries = read_entries(self.plan.output / EXPORT, model.config) if name == EXPORT else None
        files_of = {entry.file for entry in (entries or {key: model.entries[key] for key in model.shapes}).values()}
        return measure_sizes(model, entries, sum(file.stat().st_size for file in files_of))

    def _format(self, name: str) -> Any:
        if name == EXPORT:
            return format_of(model_folder.read_config(self.plan.output / EXPORT).get("quantization_config") or {})
        checkpoint = self.checkpoints[name]
        return None if checkpoint is None else checkpoint.activations
