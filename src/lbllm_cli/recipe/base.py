"""What every section of the recipe is made of."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lbllm_cli.format.group_sizes import SIZE_MAX, SIZE_MIN

COUNT = 2**31 - 1  # the largest of any number of things
LENGTH = 2**24  # of tokens in a sequence
TOKENS = 2**34  # of a set: 128 GiB in memory
GroupSize = Annotated[int, Field(ge=SIZE_MIN, le=SIZE_MAX, multiple_of=SIZE_MIN)]
Positive = Annotated[int, Field(ge=1, le=COUNT)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=100)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, numbers are finite and not read from strings, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        """`ptq:` with nothing below it has its defaults, as if it were not there; where none is a value, it is none."""
        if not isinstance(values, dict):
            return values
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        sections = {name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}
        return {key: value for key, value in values.items() if value is not None or key not in sections}


class StageSection(Section):
    """Base of the sections that a stage has."""

    @property
    def subset(self) -> int | None:
        """How many sequences of its text a stage reads, spread evenly over them; None: all."""
        return None
