"""The tokenizer of a model folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError, reason
from lbllm_cli.core.model_folder import code_hint, read_config

if TYPE_CHECKING:
    from lbllm_cli.recipe.schema import Model

# One of these is a tokenizer's vocabulary.
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt")
# Classes that are imported without torch: of 3.8 seconds that leaves 0.6.
_QWEN2 = frozenset({"Qwen2Tokenizer", "Qwen2TokenizerFast"})
_LIGHT = _QWEN2 | {"PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer", "GPT2TokenizerFast"}
# By model type, those of them that AutoTokenizer takes as they are named. Of others it knows better, and they cut text otherwise.
_AS_NAMED = {"llama": _LIGHT, "qwen3": _LIGHT, "seed_oss": _LIGHT, "qwen2": _QWEN2}


def open_tokenizer(recipe: "Model", folder: Path) -> Any:
    """The model's tokenizer. Raises UsageError when the folder has none."""
    return read_tokenizer(folder, recipe.trust_remote_code)


def read_tokenizer(folder: Path, trust_remote_code: bool, light: bool = False) -> Any:
    """Tokenizer of a model folder. Raises UsageError when it has none that can be used.

    trust_remote_code: whether code that the folder brings may run; transformers would ask on the terminal. light: without
    importing torch, where its class is one that needs none; the same tokenizer.
    """
    if not any(path.exists() for name in _TOKENIZERS for path in folder.glob(name)):
        raise UsageError(f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model; copy the model's own")
    settings = folder / "tokenizer_config.json"
    values = files.read_json(settings) if settings.exists() else {}
    try:
        if light and (found := _light_class(folder, values)) is not None:
            tokenizer = found.from_pretrained(folder)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here; all mean that the files are unusable
        hint = code_hint(values, trust_remote_code)
        raise UsageError(f"{folder}: the tokenizer cannot be loaded: {reason(error)}{hint}") from None
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UsageError(f"{settings}: model_max_length: expected a number, got {str(tokenizer.model_max_length)[:40]}")
    return tokenizer


def _light_class(folder: Path, values: Any) -> Any | None:
    """The class that a tokenizer_config.json names, where AutoTokenizer would take it and the folder brings no code."""
    if not isinstance(values, dict) or values.get("auto_map") or not (folder / "tokenizer.json").exists():
        return None
    name = values.get("tokenizer_class")
    kind = str(read_config(folder).get("model_type")) if (folder / "config.json").exists() else ""
    if not isinstance(name, str) or name not in _AS_NAMED.get(kind, ()):
        return None
    import transformers

    return getattr(transformers, name)
