"""Lines of a stage's events.jsonl: what `pipeline.reporter.Reporter` writes, read again by those who draw it.

A run that was killed leaves half a line, and anybody may have edited the file: a line that cannot be used is passed over.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Kind = Literal["block", "step", "phase"]
_Seconds = Annotated[float, Field(ge=0, le=1e12)]
_Bytes = Annotated[float, Field(ge=0, le=1e18)]
_Name = Annotated[str, Field(pattern=r"^\w+(\.\w+){1,7}$", max_length=100)]
_Count = Annotated[int, Field(ge=0, le=10**9)]


class _Rank(BaseModel):
    """Of several processes at a stage one, and the seconds in which it did not wait for the others."""

    model_config = ConfigDict(strict=True)

    busy: Annotated[float, Field(ge=-1e3, le=1e12)]


class _Line(BaseModel):
    """What lines of every kind have."""

    model_config = ConfigDict(strict=True)

    seconds: _Seconds | None = None
    peak_ram_bytes: _Bytes | None = None
    peak_device_bytes: _Bytes | None = None
    skipped: _Count | None = None
    ranks: list[_Rank] | None = None


class _BlockErrors(BaseModel):
    model_config = ConfigDict(strict=True)

    error: float
    error_ordinary: float


class _Epoch(BaseModel):
    model_config = ConfigDict(strict=True)

    loss: float
    held_out_loss: float


class _Linear(BaseModel):
    model_config = ConfigDict(strict=True)

    error: float


class _BlockLine(_Line):
    block: Annotated[int, Field(ge=0, le=10**5)]
    best_epoch: _Count | None = None
    before: _BlockErrors | None = None
    after: _BlockErrors | None = None
    epochs: list[_Epoch] | None = None
    linears: dict[_Name, _Linear] = {}

    @model_validator(mode="after")
    def _whole(self) -> "_BlockLine":
        trained = (self.before, self.after, self.epochs)
        if None in trained and trained != (None, None, None):
            raise ValueError("before, after and epochs belong together")
        return self


class _StepLine(_Line):
    step: _Count
    tokens: Annotated[float, Field(ge=0, le=1e18)]
    loss: float | None


class _PhaseErrors(BaseModel):
    model_config = ConfigDict(strict=True)

    kl: float


class _PhaseLine(_Line):
    phase: str
    before: _PhaseErrors
    after: _PhaseErrors


_KINDS: dict[Kind, type[_Line]] = {"block": _BlockLine, "step": _StepLine, "phase": _PhaseLine}


def read_records(events: Path, kind: Kind) -> list[dict[str, Any]]:
    """The last record of each block, step or phase in an events.jsonl, in order; a line that is none is passed over."""
    found: dict[Any, dict[str, Any]] = {}
    if not events.is_file():
        return []
    with events.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                if isinstance(record, dict) and kind in record:
                    _KINDS[kind].model_validate(record)
                    found[record[kind]] = record
            except (ValueError, RecursionError, ValidationError):
                continue
    return [found[key] for key in sorted(found)]
