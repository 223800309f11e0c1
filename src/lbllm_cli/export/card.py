"""The model card of an export."""

import os
from pathlib import Path

from lbllm_cli import __version__
from lbllm_cli.core.markdown import literal
from lbllm_cli.export.base import Exporter
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.checkpoint import Checkpoint


def model_card(model: SourceModel, checkpoint: Checkpoint, by: Exporter) -> str:
    """Model card: what this is and how to load it."""
    name = literal(Path(os.path.abspath(model.folder)).name)
    layout = checkpoint.activations if by.quantizes else None
    lines = [f"# {name}, W(1+1){f'A{layout.bits}KV{layout.kv_bits}' if layout else ''}, {checkpoint.stage}", ""]
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
