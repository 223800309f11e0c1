"""The text model inside a folder of a model that sees pictures as well: it alone is read, as if the folder held nothing else."""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lbllm_cli.core.headers import Part, TensorEntry
from lbllm_cli.models.families import FAMILIES

# Beginnings of names in such folders, in the layouts of both years, and what they are in a text model's own.
_TEXT = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}
_OTHERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
# The same for transformers, as patterns.
KEY_MAPPING = {f"^{old}".replace(".", r"\."): new for old, new in _TEXT.items()}


def inner_type(values: dict[str, Any]) -> str | None:
    """`model_type` of the text model inside, by the values of config.json; None where there is none that lbllm knows."""
    text = values.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    return kind if family is not None and values.get("model_type") in family.within else None


def inner_config(config: PretrainedConfig, values: dict[str, Any]) -> PretrainedConfig:
    """The text model's configuration. Whether head and embedding are one is said outside of it, where it is said."""
    inner = config.get_text_config()
    inner.tie_word_embeddings = bool(values.get("tie_word_embeddings", inner.tie_word_embeddings))
    return inner


def inner_values(values: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json of the text model alone."""
    kind = inner_type(values)
    assert kind is not None
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
    outer = {key: values[key] for key in shared if key in values}
    own = {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]], "model_type": kind, "tie_word_embeddings": tied}
    return {**outer, **values["text_config"], **own}


def inner_entries(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Stored tensors of the text model, by the names of a folder that holds it alone."""
    found = {}
    for name, entry in entries.items():
        if name.startswith(_OTHERS):
            continue
        old = next((old for old in _TEXT if name.startswith(old)), None)
        if old is None:
            found[name] = entry
        else:
            found[_TEXT[old] + name.removeprefix(old)] = replace(entry, part=Part(name))
    return found
