"""The tokenizer of a model folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError, reason
from lbllm_cli.models.config import code_hint

if TYPE_CHECKING:
    from lbllm_cli.recipe.schema import Model

# One of these is a tokenizer's vocabulary.
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt")


def open_tokenizer(recipe: "Model", folder: Path) -> Any:
    """The model's tokenizer. Raises UsageError when the folder has none."""
    return read_tokenizer(folder, recipe.trust_remote_code)


def read_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """Tokenizer of a model folder. Raises UsageError when it has none that can be used.

    trust_remote_code: whether code that the folder brings may run; transformers would ask on the terminal.
    """
    if not any(path.exists() for name in _TOKENIZERS for path in folder.glob(name)):
        raise UsageError(f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model; copy the model's own")
    settings = folder / "tokenizer_config.json"
    hint = code_hint(files.read_json(settings), trust_remote_code) if settings.exists() else ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here; all mean that the files are unusable
        raise UsageError(f"{folder}: the tokenizer cannot be loaded: {reason(error)}{hint}") from None
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UsageError(f"{settings}: model_max_length: expected a number, got {str(tokenizer.model_max_length)[:40]}")
    return tokenizer
