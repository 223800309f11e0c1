"""One run of `lbllm eval` in its output folder: what is known already, and what is still to be measured."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import LbllmError, RunError, UsageError
from lbllm_cli.core.own_folders import remove_own
from lbllm_cli.data.tokens import tokens_hash
from lbllm_cli.evaluation import tasks as lm_tasks
from lbllm_cli.evaluation.cache import Measurements
from lbllm_cli.evaluation.perplexity import Evaluation, whole_perplexity
from lbllm_cli.evaluation.records import Named, NamedTask
from lbllm_cli.evaluation.results import Checkpoints, identity, present, tables
from lbllm_cli.export import writer
from lbllm_cli.export.base import Form
from lbllm_cli.export.card import Described
from lbllm_cli.pipeline.checkpoint import complete_stages
from lbllm_cli.pipeline.folders import EVAL_STREAMS, EXPORT_FOLDER
from lbllm_cli.pipeline.forecast import Place
from lbllm_cli.pipeline.lineage import open_checkpoint
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.reporter import Reporter
from lbllm_cli.recipe.stages import BASE, EXPORT, USUAL_FORMAT


def wanted_checkpoints(plan: Plan) -> Checkpoints:
    """What is measured; every checkpoint belongs to this model and is unchanged."""
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

    def __init__(self, plan: Plan, checkpoints: Checkpoints, place: Place, fresh: bool):
        self.plan = plan
        self.checkpoints = checkpoints
        self.folder = plan.output / "eval"
        self.streams = self.folder / "streams" if place == "disk" else None
        self.place = place
        self.known = Measurements(self.folder / "measured", fresh)
        # What could not be measured, by checkpoint and text.
        self.failed: list[tuple[str, str]] = []

    def unknown(self, sets: dict[str, Tensor], tasks: list[lm_tasks.Task]) -> dict[str, list[str]]:
        """What a run would measure: names of texts and tasks by checkpoint, of those that lack any. Nothing is written."""
        found: dict[str, list[str]] = {name: [] for name in self.checkpoints}
        for (name, text), what in self._whats(sets).items():
            found[name] += [text] if self.known.get(what) is None else []
        for name, names in found.items():
            names += [task.name for task, what in self._asked(name, tasks) if self.known.get(what) is None]
        return {name: names for name, names in found.items() if names}

    def results(self, sets: dict[str, Tensor], tasks: list[lm_tasks.Task]) -> dict[str, Any] | None:
        """Measures what was asked for, and gives it by checkpoint; everything measured is kept as it comes.

        results.json, and details.json with what is not for a table, have beside it what earlier runs measured of what is still
        the same. Of several ranks the first one writes them, and alone measures what needs a model that is whole in memory; None
        of others.
        """
        (self.streams or self.folder).mkdir(parents=True, exist_ok=True)
        self._compare(sets)
        if not self.plan.group.first:
            return None
        self._export_texts(sets)
        scores = [self._scores(name, tasks) for name in self.checkpoints]
        named = {task.name: self._named(task, sorted({line for found in scores for line in found[task.name]})) for task in tasks}
        groups = [name for name in self.plan.recipe.eval.tasks if name in lm_tasks.GROUPS]
        now = Named(texts={text: tokens_hash(tokens) for text, tokens in sets.items()}, tasks=named, groups=groups)
        results, _ = tables(self.plan, self.known, self.checkpoints, now)
        whole, details = tables(self.plan, self.known, present(self.plan, self.checkpoints), self.known.name(now))
        shown = [name for name, found in whole.items() if name in results or found["perplexity"] or "tasks" in found]
        files.write_json(self.folder / "details.json", {name: details[name] for name in shown})
        files.write_json(self.folder / "results.json", {name: whole[name] for name in shown})
        remove_own(self.folder / "streams", EVAL_STREAMS)
        self.known.sweep()
        return results

    def _whats(self, sets: dict[str, Tensor]) -> dict[tuple[str, str], dict[str, Any]]:
        """What each measurement of a checkpoint on a text depends on."""
        return {
            (name, text): {**identity(self.plan, name, checkpoint), "text": tokens_hash(tokens)}
            for name, checkpoint in self.checkpoints.items()
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
                self._keep(key, whats, None if values is None else values.as_dict())

    def _keep(self, key: tuple[str, str], whats: dict[tuple[str, str], dict[str, Any]], found: dict[str, Any] | None) -> None:
        """Keeps what was measured, or that it could not be."""
        if found is None:
            self.failed.append(key)
        if not self.plan.group.first or key not in whats:
            return
        if found is None:
            self.known.forget(whats[key])
        else:
            self.known.put(whats[key], found)

    def _export_texts(self, sets: dict[str, Tensor]) -> None:
        """Measures the export, whole in memory, on what it was not measured on before."""
        whats = self._whats(sets)
        missing = [text for (name, text), what in whats.items() if name == EXPORT and self.known.get(what) is None]
        if not missing:
            return
        lm = self._open(self.plan.output / EXPORT)
        for text in missing:
            found = whole_perplexity(lm.model, sets[text], self.plan.model.device)
            self._keep((EXPORT, text), whats, None if found is None else {"perplexity": found})

    def _open(self, folder: Path) -> Any:
        recipe, model = self.plan.recipe, self.plan.model
        return lm_tasks.open_lm(folder, model.dtype, model.device, recipe.eval.batch_size, recipe.model.trust_remote_code)

    def _named(self, task: lm_tasks.Task, lines: list[str]) -> NamedTask:
        limit, version = self.plan.recipe.eval.limit, lm_tasks.version()
        return NamedTask(task=task.identity, num_fewshot=task.num_fewshot, limit=limit, lm_eval=version, lines=lines)

    def _asked(self, name: str, tasks: list[lm_tasks.Task]) -> list[tuple[lm_tasks.Task, dict[str, Any]]]:
        """Tasks, and what the scores of a checkpoint depend on."""
        own = identity(self.plan, name, self.checkpoints[name])
        return [(task, {**own, **self._named(task, []).what}) for task in tasks]

    def _scores(self, name: str, tasks: list[lm_tasks.Task]) -> dict[str, dict[str, Any]]:
        """task -> its flat scores; a model is opened only where one is missing."""
        asked, limit = self._asked(name, tasks), self.plan.recipe.eval.limit
        whats = {task.name: what for task, what in asked}
        missing = [task for task, what in asked if self.known.get(what) is None]
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
