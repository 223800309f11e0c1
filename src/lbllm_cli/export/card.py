"""The model card of an export, as the Hub renders it."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from lbllm_cli import __version__
from lbllm_cli.core.markdown import literal
from lbllm_cli.export.base import Exporter
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.checkpoint import Checkpoint

# What the source's card says of what may be done with it, and which languages it knows.
_CARRIED = ("license", "license_name", "license_link", "language")


def model_card(model: SourceModel, checkpoint: Checkpoint, by: Exporter, path: str) -> str:
    """Model card: what this is and how to load it. path: of the source, as the recipe has it: a folder or a Hub id."""
    local = os.path.isdir(os.path.expanduser(path))
    name = literal(Path(os.path.abspath(model.folder)).name if local else path)
    layout = checkpoint.activations if by.quantizes else None
    front = yaml.safe_dump(_front(model, None if local else path, by), sort_keys=False, allow_unicode=True)
    lines = ["---", *front.splitlines(), "---", ""]
    lines += [f"# {name}, W(1+1){f'A{layout.bits}KV{layout.kv_bits}' if layout else ''}, {checkpoint.stage}", ""]
    lines.append(
        f"The linear layers of {name}'s decoder blocks are binarized to a sign bit and a bitmap bit per weight, four levels "
        f"per group of {checkpoint.record.group_size} inputs (LBLLM, arXiv 2604.19167), by lbllm {__version__}, "
        f"stage `{checkpoint.stage}`. "
        f"Embeddings, {'' if checkpoint.read_outer() else 'norms, '}biases and head are those of the source model. "
        "The source model's licence applies."
    )
    lines.append("")
    if layout:
        lines += [
            f"Activations are quantized to {layout.bits} bits as it runs, keys and values to {layout.kv_bits}, in the cache too; "
            "`lbllm_cli.hf.quantize_activations(model, False)` turns that off.",
            "",
        ]
    return "\n".join([*lines, *by.loading()]) + "\n"


def _front(model: SourceModel, base: str | None, by: Exporter) -> dict[str, Any]:
    """What the Hub reads. base: the source's id there."""
    carried: dict[str, Any] = {}
    # A card that is not there, or is no card, has nothing to carry over.
    with suppress(OSError, ValueError, yaml.YAMLError):
        carried = metadata_load(model.folder / "README.md") or {}
    found: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    found |= {key: carried[key] for key in _CARRIED if key in carried}
    return found | {"pipeline_tag": "text-generation", "library_name": by.library, "tags": ["lbllm", "2-bit"]}
