"""The files of `lbllm eval` as they may be: results.json and details.json, which a report reads, and what was measured before.

They are the user's to open and to change. Names and numbers are checked before a table or a figure is made of them.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.validation import describe
from lbllm_cli.recipe.base import Name
from lbllm_cli.recipe.stages import MeasuredName

EVAL = "lbllm eval --recipe ..."
# At least 1; infinite beyond what a double holds. Rounded to four digits, and kept whole.
_Perplexity = Annotated[float, Field(ge=0.999)]
_Score = float | int | None
_Tasks = dict[str, dict[str, _Score]]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Result(_Record):
    """A checkpoint's entry in results.json; see `evaluation.sizes.result`. checkpoint: hash of its weights, of a stage."""

    perplexity: dict[Name, _Perplexity]
    kl: dict[Name, float] = {}
    top1: dict[Name, float] = {}
    routing: dict[Name, float] = {}
    tasks: _Tasks = {}
    bits_per_weight: float | None = None
    bits_per_parameter: float | None = None
    bytes: int | None = None
    activation_bits: int | None = None
    kv_bits: int | None = None
    checkpoint: str | None = None


class _Positions(_Record):
    first: Annotated[int, Field(ge=1, le=2**40)]
    last: Annotated[int, Field(ge=1, le=2**40)]
    perplexity: _Perplexity


class _Block(_Record):
    relative: float
    relative_ordinary: float
    cosine: float
    decibels: float | None
    routing: Annotated[float, Field(ge=0, le=1)] | None = None


class Detail(_Record):
    """A checkpoint on one text in details.json."""

    positions: Annotated[list[_Positions], Field(min_length=1)] | None = None
    blocks: list[_Block] = []


class MeasuredText(Detail):
    """A checkpoint on one text, as it is kept; see `evaluation.perplexity.Measured.as_dict`."""

    perplexity: _Perplexity
    kl: float | None = None
    top1: float | None = None
    routing: float | None = None


class NamedTask(_Record):
    """What the scores of a task depend on beside the model, and the names that they have in results.json, `lines`."""

    task: dict[str, Any]
    num_fewshot: int | None
    limit: int | float | None
    lm_eval: str
    lines: list[str] = []

    @property
    def what(self) -> dict[str, Any]:
        """As measurements of it are kept under."""
        return {"task": self.task, **self.setting}

    @property
    def setting(self) -> dict[str, Any]:
        """What the tasks of a group have in common."""
        return {"num_fewshot": self.num_fewshot, "limit": self.limit, "lm-eval": self.lm_eval}


class Named(_Record):
    """What the names in results.json stand for: of texts the hash of their tokens. groups: of tasks, whose average is there."""

    texts: dict[Name, str] = {}
    tasks: dict[str, NamedTask] = {}
    groups: list[str] = []


class _Details(_Record):
    texts: dict[Name, Detail]

    @model_validator(mode="after")
    def _one_depth(self) -> "_Details":
        depths = {len(found.blocks) for found in self.texts.values() if found.blocks}
        if len(depths) > 1:
            raise ValueError(f"blocks: {sorted(depths)} of them, expected as many on each text")
        return self


_RESULTS = TypeAdapter(dict[MeasuredName, Result])
_DETAILS = TypeAdapter(dict[MeasuredName, _Details])
_TEXT = TypeAdapter(MeasuredText)
_TASK = TypeAdapter(_Tasks)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """results.json; {} where it is not there. Raises UsageError where it is not what `eval` writes."""
    return _read(path, _RESULTS, lambda values: values)


def read_details(path: Path) -> dict[str, dict[str, Any]]:
    """details.json; as `read_results`."""
    return _read(path, _DETAILS, lambda values: {name: {"texts": texts} for name, texts in values.items()})


def _read(path: Path, kind: TypeAdapter[Any], wrapped: Any) -> dict[str, dict[str, Any]]:
    try:
        values = files.read_json(path)
        if not isinstance(values, dict):
            raise UsageError(f"expected an object, got {type(values).__name__}")
        kind.validate_python(wrapped(values))
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise UsageError(f"{path} is damaged; run: {EVAL} ({describe(error)})") from None
    except UsageError as error:
        raise UsageError(f"{path} is damaged; run: {EVAL} ({error})") from None
    return values


def is_measured(found: Any, task: bool) -> bool:
    """Whether a value is what `eval` keeps of a text, or of a task."""
    try:
        (_TASK if task else _TEXT).validate_python(found)
    except ValidationError:
        return False
    return True
