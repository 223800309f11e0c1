"""What a run has left in its output folder: records of its stages, what `eval` measured, and whether the two still belong."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.headers import TensorEntry
from lbllm_cli.evaluation.records import is_measured, read_details, read_results
from lbllm_cli.export.writer import RECORD, content
from lbllm_cli.pipeline.checkpoint import Checkpoint, complete_stages, unfinished
from lbllm_cli.pipeline.stage_record import read_progress
from lbllm_cli.recipe.stages import BASE, EXPORT, STAGES
from lbllm_cli.training.log_records import read_records


@dataclass(frozen=True)
class StageRecord:
    """A stage's folder. checkpoint: None while the stage is unfinished. entries: of its tensors; None where it has no checkpoint,
    or files of that are missing or damaged. blocks, steps: see `read_records`; a stage has one kind. phase: what is known of an
    end-to-end phase as a whole, one record or none. done: blocks committed.
    """

    stage: str
    folder: Path
    checkpoint: Checkpoint | None
    entries: dict[str, TensorEntry] | None
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
    complete and being made again. results, details: of `eval`, empty where it has not run. unreadable: by stage, what is
    missing or damaged of it, and what mends that.
    """

    output: Path
    stages: dict[str, StageRecord]
    again: dict[str, int]
    results: dict[str, dict[str, Any]]
    details: dict[str, dict[str, Any]]
    unreadable: dict[str, str]

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
        # Of one whose record is damaged nobody knows.
        told = [name for name in self.results if name != BASE and (name in self.complete or name not in self.unreadable)]
        return [
            name for name in told if not set(self.results[name]["perplexity"].values()) <= kept.get(self._content(name), set())
        ]

    def _content(self, name: str) -> str:
        """What a measurement of a checkpoint is kept under."""
        if name == EXPORT and name not in self.unreadable and (self.output / EXPORT / RECORD).exists():
            return content(self.output / EXPORT)
        return self.complete[name].content if name in self.complete else "gone"


def read_run(output: Path) -> Run:
    """Everything that is known of a run.

    Raises UsageError where there is nothing, or nothing that can be read, and where results are damaged.
    """
    stages: dict[str, StageRecord] = {}
    again: dict[str, int] = {}
    unreadable: dict[str, str] = {}

    @contextmanager
    def noting(stage: str) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            unreadable[stage] = "; ".join(filter(None, (unreadable.get(stage), str(error))))

    present = complete_stages(output)
    for stage, spec in STAGES.items():
        folder, progress = output / stage, unfinished(output, stage)
        checkpoint, entries, done = None, None, None
        with noting(stage):
            if stage in present:
                checkpoint = Checkpoint(output, stage)
                entries = checkpoint.entries()
        with noting(stage):
            if progress.exists():
                done = read_progress(progress, f"run: {spec.remake}").blocks_done
        if checkpoint is not None:
            blocks = checkpoint.record.blocks
            again |= {} if done is None else {stage: done}
        elif done is not None:
            folder, blocks = progress.parent, done
        else:
            continue
        events = folder / "events.jsonl"
        # A record of a block that is not there, of an unfinished run before this one, is of no weights that can be drawn.
        there = [record for record in read_records(events, "block") if record["block"] < blocks]
        steps, phase = read_records(events, "step"), read_records(events, "phase")
        stages[stage] = StageRecord(stage, folder, checkpoint, entries, there, steps, phase, blocks)
    with noting(EXPORT):
        if (output / EXPORT / RECORD).exists():
            content(output / EXPORT)
    results, details = read_results(output / "eval" / "results.json"), read_details(output / "eval" / "details.json")
    if not stages and not results:
        nothing = f"there is no run in {output}, neither a stage nor results; run: lbllm ptq --recipe ..."
        raise UsageError("\n".join(unreadable.values()) or nothing)
    return Run(output, stages, again, results, details, unreadable)


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
