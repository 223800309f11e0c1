"""The model card of an export, as the Hub renders it."""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from lbllm_cli import __version__
from lbllm_cli.core.markdown import literal
from lbllm_cli.export.base import Exporter, Form
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.checkpoint import Checkpoint

# What the source's card says of what may be done with it, and which languages it knows.
_CARRIED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Described:
    """What a card says beside what its checkpoint knows.

    path: of the source, as the recipe has it: a folder or a Hub id. place: where the export will lie. results: by `base` and
    `stage`, entries of results.json with the same texts and tasks; empty where nothing was measured.
    """

    path: str
    place: str = "PATH_TO_THIS_FOLDER"
    results: dict[str, dict[str, Any]] = field(default_factory=dict)


def model_card(model: SourceModel, checkpoint: Checkpoint, by: Exporter, form: Form, about: Described) -> str:
    """Model card: what this is, what it was measured at, and how to run it."""
    path = about.path
    local = os.path.isdir(os.path.expanduser(path))
    name = literal(Path(os.path.abspath(model.folder)).name if local else path)
    layout = checkpoint.activations if by.quantizes else None
    front = yaml.safe_dump(_front(model, None if local else path, by), sort_keys=False, allow_unicode=True)
    lines = ["---", *front.splitlines(), "---", ""]
    lines += [f"# {name}, W(1+1){f'A{layout.bits}KV{layout.kv_bits}' if layout else ''}, {checkpoint.stage}", ""]
    lines.append(
        f"The linear layers of {name}'s decoder blocks are binarized to a sign bit and a bitmap bit per weight, four levels "
        f"per group of {checkpoint.record.weights[0]} inputs (LBLLM, arXiv 2604.19167), by lbllm {__version__}, "
        f"stage `{checkpoint.stage}`. "
        f"{_unchanged(checkpoint, form)}"
        "The source model's licence applies."
    )
    lines.append("")
    if layout:
        lines += [
            f"Activations are quantized to {layout.bits} bits as it runs, keys and values to {layout.kv_bits}, in the cache too; "
            "`lbllm_cli.hf.quantize_activations(model, False)` turns that off.",
            "",
        ]
    bits = 8 * by.weight_bytes(model, *checkpoint.record.weights) / model.binarized_parameters
    return "\n".join([*lines, *_results(about.results, bits, layout is not None), *by.loading(about.place)]) + "\n"


def _unchanged(checkpoint: Checkpoint, form: Form) -> str:
    norms = "" if checkpoint.read_outer() else "norms"
    if form.head_bits == 16:
        return f"Embeddings, {norms + ', ' if norms else ''}biases and head are those of the source model. "
    kept = f"{norms + ' and ' if norms else ''}biases are those of the source model, embeddings and head are rounded to"
    return f"{kept[0].upper()}{kept[1:]} {form.head_bits} bits. "


def _results(results: dict[str, dict[str, Any]], bits: float, quantized: bool) -> list[str]:
    """The table of what was measured. bits: per binarized weight. quantized: whether the export quantizes activations."""
    if not results:
        return []
    base, stage = results["base"], results["stage"]
    lines = ["| | source | this |", "|---|---:|---:|"]
    for text, found in stage["perplexity"].items():
        if (before := base["perplexity"].get(text)) is not None:
            lines.append(f"| perplexity, {literal(text)} | {before:.2f} | {found:.2f} ({found / before:.2f}x) |")
    for task, metrics in stage.get("tasks", {}).items():
        for metric, value in metrics.items():
            before = base.get("tasks", {}).get(task, {}).get(metric)
            if isinstance(value, float) and isinstance(before, float):
                lines.append(f"| {literal(task)}, {literal(metric)} | {before:.4f} | {value:.4f} |")
    # results.json is the user's to change.
    whole = base.get("bits_per_weight")
    lines += [f"| bits per binarized weight | {'' if whole is None else format(whole, 'g')} | {bits:.4g} |", ""]
    how = "Measured by `lbllm eval` on the checkpoint that this was made from"
    if (inputs := stage.get("activation_bits") or 16) < 16 and not quantized:
        how += f", with activations in {inputs} bits, which stay in full precision here"
    return [*lines, how + ".", ""]


def _front(model: SourceModel, base: str | None, by: Exporter) -> dict[str, Any]:
    """What the Hub reads. base: the source's id there."""
    carried: dict[str, Any] = {}
    # A card that is not there, or is no card, has nothing to carry over.
    with suppress(OSError, ValueError, yaml.YAMLError):
        carried = metadata_load(model.folder / "README.md") or {}
    found: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    found |= {key: carried[key] for key in _CARRIED if key in carried}
    return found | {"pipeline_tag": "text-generation", "library_name": by.library, "tags": ["lbllm", "2-bit"]}
