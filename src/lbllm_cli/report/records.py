"""What a run has left in its output folder: records of its stages, what `eval` measured, and whether the two still belong."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.evaluation.records import is_measured, read_details, read_results
from lbllm_cli.export.writer import RECORD, content
from lbllm_cli.pipeline.checkpoint import PROGRESS, Checkpoint, complete_stages
from lbllm_cli.pipeline.stage_record import read_progress
from lbllm_cli.recipe.stages import BASE, EXPORT, STAGES
from lbllm_cli.training.log_records import read_records


@dataclass(frozen=True)
class StageRecord:
    """A stage's folder. checkpoint: None while the stage is unfinished. blocks, steps: see `read_records`; a stage has one
    kind. phase: what is known of an end-to-end phase as a whole, one record or none. done: blocks committed.
    """

    stage: str
    folder: Path
    checkpoint: Checkpoint | None
    blocks: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    phase: list[dict[str, Any]]
    done: int

    def total(self, key: str) -> float | None:
        """Sum of a fact over the blocks or steps; None where none has it."""
        values = [record[key] for record in (*self.blocks, *self.steps, *self.phase) if record.get(key) is not None]
        return sum(values) if values else None

    def peak(self, key: str) -> float | None:
        """Largest value of a fact over the blocks or steps; None where none has it."""
        return max((record[key] for record in (*self.blocks, *self.steps) if record.get(key) is not None), default=None)

    def text(self, name: str) -> str | None:
        """A file of the folder, None where it is not there or no text."""
        try:
            return files.read_text(self.folder / name)
        except (FileNotFoundError, UsageError):
            return None


@dataclass(frozen=True)
class Run:
    """An output folder. stages: complete ones, and unfinished ones, in pipeline order. again: blocks done of a stage that is
    complete and being made again. results, details: of `eval`, empty where it has not run.
    """

    output: Path
    stages: dict[str, StageRecord]
    again: dict[str, int]
    results: dict[str, dict[str, Any]]
    details: dict[str, dict[str, Any]]

    @property
    def complete(self) -> dict[str, Checkpoint]:
        """Checkpoints of the finished stages."""
        return {name: record.checkpoint for name, record in self.stages.items() if record.checkpoint is not None}

    def texts(self) -> list[str]:
        """Names of the texts that any checkpoint was measured on."""
        return list(dict.fromkeys(text for result in self.results.values() for text in result["perplexity"]))

    def outdated(self) -> list[str]:
        """Checkpoints whose results are not those of what lies in the folder now.

        Told by what `eval` keeps of each measurement, not by the age of files, which a stage that is up to date renews.
        """
        kept: dict[str, set[float]] = {}
        for path in sorted((self.output / "eval" / "measured").glob("*.json")):
            what, value = _measured(path)
            if value is not None:
                kept.setdefault(what, set()).add(round(value, 4))
        return [
            name
            for name, result in self.results.items()
            if name != BASE and not set(result["perplexity"].values()) <= kept.get(self._content(name), set())
        ]

    def _content(self, name: str) -> str:
        """What a measurement of a checkpoint is kept under."""
        if name == EXPORT and (self.output / EXPORT / RECORD).exists():
            return content(self.output / EXPORT)
        return self.complete[name].content if name in self.complete else "gone"


def read_run(output: Path) -> Run:
    """Everything that is known of a run. Raises UsageError where there is nothing, or a record is damaged."""
    complete = complete_stages(output)
    partial = {stage: output / f"{stage}.partial" for stage in STAGES}
    done = {
        stage: read_progress(folder / PROGRESS, f"run: {STAGES[stage].remake}").blocks_done
        for stage, folder in partial.items()
        if (folder / PROGRESS).exists()
    }
    stages = {}
    for stage in STAGES:
        if stage in complete:
            folder, checkpoint = output / stage, Checkpoint(output, stage)
            blocks = checkpoint.record.blocks
        elif stage in done:
            folder, checkpoint, blocks = partial[stage], None, done[stage]
        else:
            continue
        events = folder / "events.jsonl"
        # A record of a block that is not there, of an unfinished run before this one, is of no weights that can be drawn.
        there = [record for record in read_records(events, "block") if record["block"] < blocks]
        steps, phase = read_records(events, "step"), read_records(events, "phase")
        stages[stage] = StageRecord(stage, folder, checkpoint, there, steps, phase, blocks)
    results, details = read_results(output / "eval" / "results.json"), read_details(output / "eval" / "details.json")
    if not stages and not results:
        raise UsageError(f"there is no run in {output}, neither a stage nor results; run: lbllm ptq --recipe ...")
    return Run(output, stages, {stage: done[stage] for stage in complete if stage in done}, results, details)


def _measured(path: Path) -> tuple[str, float | None]:
    """What a file of eval/measured is of, and the perplexity in it; None where it is of a task, or damaged."""
    try:
        record = files.read_json(path)
    except (UsageError, FileNotFoundError):
        return "", None
    values: dict[str, Any] = record if isinstance(record, dict) else {}
    what, found = values.get("what"), values.get("found")
    if not isinstance(what, dict) or not isinstance(found, dict) or not is_measured(found, task=False):
        return "", None
    return str(what.get("checkpoint") or what.get("export") or ""), found["perplexity"]
