"""Text and tokens in a recipe: sources, and the sets that stages and measurements read of them."""

from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lbllm_cli.recipe.base import LENGTH, TOKENS, Name, Positive, Section


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
    # YAML reads a mapping at the head of `[generate:, a.txt]`.
    items = ["generate:" if item == {"generate": None} else item for item in items]
    return [{"source": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[Source], BeforeValidator(_as_sources), Field(min_length=1)]


def check_size(key: str, count: int, length: int) -> None:
    """Raises ValueError where `count` sequences of `length` tokens are more than are read."""
    if count * length > TOKENS:
        raise ValueError(f"{key}: {count} of {length} tokens are {count * length:,}; at most {TOKENS:,} are read; lower one")


class TokenSet(Section):
    """Tokens to calibrate or train on."""

    source: Sources = Field([Source(source="builtin:calibration")], description="one source or a mixture")
    sequences: Positive = Field(32, description="sequences of `length` tokens")
    length: int = Field(512, ge=8, le=LENGTH, description="tokens in a sequence")
    bos: bool = Field(False, description="start every sequence with the tokenizer's BOS")

    @model_validator(mode="after")
    def _fits_memory(self) -> "TokenSet":
        check_size("sequences", self.sequences, self.length)
        return self


class TrainingSet(TokenSet):
    """Tokens to train on."""

    sequences: Positive = Field(256, description="sequences of `length` tokens")


class EvaluationSet(Section):
    """One text to measure perplexity on."""

    name: Name = Field(description="what results call it")
    source: Sources = Field(description="one source or a mixture")
    length: int = Field(1024, ge=8, le=LENGTH, description="tokens in a segment")
    segments: Positive | None = Field(None, description="segments from the start of the text; default all")
    bos: bool = Field(False, description="start every segment with the tokenizer's BOS")

    @property
    def key(self) -> str:
        """What messages call it."""
        return f"data.evaluation {self.name}"

    @model_validator(mode="after")
    def _fits_memory(self) -> "EvaluationSet":
        check_size("segments", self.segments or 1, self.length)
        return self


def _builtin_evaluation() -> list[EvaluationSet]:
    return [
        EvaluationSet(name=style, source=[Source(source=f"builtin:evaluation/{style}")], length=1024, segments=40)
        for style in ("novels", "technical", "modern")
    ]


class Data(Section):
    """Text for every stage."""

    calibration: TokenSet = Field(default_factory=TokenSet)
    training: TrainingSet = Field(default_factory=TrainingSet)
    evaluation: list[EvaluationSet] = Field(default_factory=_builtin_evaluation, min_length=1)

    @field_validator("evaluation")
    @classmethod
    def _names_differ(cls, value: list[EvaluationSet]) -> list[EvaluationSet]:
        names = [item.name for item in value]
        if len(set(names)) != len(names):
            raise ValueError(f"evaluation names must differ, got {', '.join(names)}")
        return value
