"""What a run has left in its output folder: records of its stages, what `eval` measured, and whether the two still belong."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbllm_cli.checkpoint import PROGRESS, STAGES, Checkpoint, complete_stages, remake
from lbllm_cli.errors import UsageError
from lbllm_cli.stages.evaluate import BASE
from lbllm_cli.stages.export import EXPORT, RECORD, content

_EVAL = "lbllm eval --recipe ..."


def read_records(events: Path, kind: str) -> list[dict[str, Any]]:
    """The last record of each block, step or phase in an events.jsonl, in order; a line that a crash cut short is passed over."""
    found: dict[Any, dict[str, Any]] = {}
    for line in events.read_text(encoding="utf-8").splitlines() if events.exists() else ():
        try:
            record = json.loads(line)
            found[record[kind]] = record
        except (ValueError, TypeError, KeyError):
            continue
    return [found[key] for key in sorted(found)]


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
        """A file of the folder, None where it is not there."""
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.exists() else None


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
            record = _read(path, _EVAL)
            what, value = record.get("what", {}), record.get("found", {}).get("perplexity")
            if value is not None:
                kept.setdefault(what.get("checkpoint") or what.get("export") or "", set()).add(round(value, 4))
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
        stage: len(_read(folder / PROGRESS, remake(stage))["files"])
        for stage, folder in partial.items()
        if (folder / PROGRESS).exists()
    }
    stages = {}
    for stage in STAGES:
        if stage in complete:
            folder, checkpoint = output / stage, Checkpoint(output, stage)
            blocks = int(checkpoint.manifest["blocks"])
        elif stage in done:
            folder, checkpoint, blocks = partial[stage], None, done[stage]
        else:
            continue
        records = {kind: read_records(folder / "events.jsonl", kind) for kind in ("block", "step", "phase")}
        stages[stage] = StageRecord(stage, folder, checkpoint, records["block"], records["step"], records["phase"], blocks)
    found = {name: output / "eval" / f"{name}.json" for name in ("results", "details")}
    results, details = ({} if not path.exists() else _read(path, _EVAL) for path in found.values())
    if not stages and not results:
        raise UsageError(f"there is no run in {output}, neither a stage nor results; run: lbllm ptq --recipe ...")
    return Run(output, stages, {stage: done[stage] for stage in complete if stage in done}, results, details)


def _read(path: Path, command: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"{path} is damaged; run: {command}") from None
    return found
