"""What every section of the recipe is made of."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

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


class Source(Section):
    """One source of text or tokens; `source` alone may be written as a plain string."""

    source: str = Field(min_length=1, description="builtin:..., generate:, hub:NAME, a preset, or a path")
    weight: float = Field(1.0, ge=1e-9, le=1e9, description="share of the sequences when several sources are mixed")
    text_key: str = Field("text", description="field of a record that holds the text")
    messages_key: str | None = Field(None, description="field that holds chat messages; the chat template renders them")
    split: str | None = Field(None, description="split of a dataset; default train, for evaluation test")
    config: str | None = Field(None, description="configuration name of a hub dataset")
    path: str | None = Field(None, description="local file with a preset's schema, instead of the hub")
    temperature: float = Field(1.0, ge=0.01, le=2, description="generate: sampling temperature")
    repeats: float = Field(0.0, ge=0, le=1, description="share of the sequences in which passages come again, to train on")

    @property
    def sampled(self) -> bool:
        """Whether its text is sampled from the model."""
        return self.source == "generate:"


def _as_sources(value: object) -> object:
    """A name, a mapping or a list of either: always a list of mappings afterwards."""
    items = value if isinstance(value, list) else [value]
    # Of `[generate:, a.txt]`, and of `"generate:"` whose quotes a shell took off, YAML makes a mapping.
    items = ["generate:" if item == {"generate": None} else item for item in items]
    return [{"source": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[Source], BeforeValidator(_as_sources), Field(min_length=1)]
