"""generation_config.json of a model folder: what a stream of text takes from it, checked."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError

if TYPE_CHECKING:
    from transformers import GenerationConfig

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens")
# Least and most. The rest of the file (beams, caches, lengths) is for other uses than one stream of text.
_NUMBERS: dict[str, tuple[type, float, float]] = {
    "top_k": (int, 0, 1 << 31),
    "no_repeat_ngram_size": (int, 0, 1 << 31),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "typical_p": (float, 0, 1),
    "repetition_penalty": (float, 1e-3, 1e3),
}


def read_values(folder: Path) -> dict[str, Any] | None:
    """Special tokens and sampling settings of a model folder, what is null left out; None where it has no generation_config.json.

    Temperatures are the command line's. Raises UsageError naming the first value that is none.
    """
    file = folder / "generation_config.json"
    if not file.exists():
        return None
    values = files.read_json(file)
    if not isinstance(values, dict):
        raise UsageError(f"{file}: expected a JSON object, got {type(values).__name__}")
    taken = {key: value for key, value in values.items() if key in (*_TOKENS, *_NUMBERS) and value is not None}
    for key, value in taken.items():
        expected = _expected(key, value)
        if expected:
            raise UsageError(f"{file}: {key}: expected {expected}, got {str(value)[:40]}; mend it or take it out")
    return taken


def read_settings(folder: Path) -> "GenerationConfig | None":
    """The same for transformers. Raises UsageError also for a file that it cannot read."""
    taken = read_values(folder)
    if taken is None:
        return None
    from transformers import GenerationConfig

    from lbllm_cli.models.config import understood

    with understood(folder / "generation_config.json"):
        # As loading the model reads it: it stops at values that nothing here uses.
        GenerationConfig.from_pretrained(folder)
        return GenerationConfig(**taken)


def _expected(key: str, value: Any) -> str | None:
    """What a value should be where it is not that."""
    if key in _TOKENS:
        tokens = value if isinstance(value, list) and value else [value]
        return None if all(type(token) is int and abs(token) < 1 << 31 for token in tokens) else "a token or several"
    kind, least, most = _NUMBERS[key]
    right = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
    return None if right and least <= value <= most else f"a number from {least} to {most}"
