"""Perplexity of the base model and of checkpoints, block by block: a model larger than memory can be scored."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lbllm_cli.activations import format_of
from lbllm_cli.checkpoint import Checkpoint
from lbllm_cli.model import Block, SourceModel
from lbllm_cli.report import Reporter
from lbllm_cli.stream import HiddenStream, advance, batches, embed_stream, stored_block

BASE = "base"
# Positions whose logits exist at once: 256 x 128,256 (Llama 3) in float32 are 131 MB.
_POSITIONS = 256


@dataclass(frozen=True)
class Sizes:
    """Sizes counted from the files.

    bits_per_weight: bits of the binarized linears over their weights (16-bit source: 16). bits_per_parameter: the same for
    the whole model, tied embeddings once. bytes: the weight files; for a stage, its block files and the rest of the model.
    """

    bits_per_weight: float
    bits_per_parameter: float
    bytes: int


def measure_sizes(model: SourceModel, checkpoint: Checkpoint | None) -> Sizes:
    """Sizes of the base model, or of a checkpoint with what it takes from the base model."""
    binarized = model.binarized_names
    parameters = model.count(list(model.shapes))
    if checkpoint is None:
        stored = sum(model.entries[name].nbytes for name in binarized)
        whole = sum(model.entries[name].nbytes for name in model.shapes)
        size = sum(file.stat().st_size for file in {model.entries[name].file for name in model.shapes})
    else:
        entries = checkpoint.entries()
        owners = {name.removesuffix(".weight") for name in binarized}
        packed = [name for name in entries if name.rpartition(".")[0] in owners and not name.endswith(".bias")]
        stored = sum(entries[name].nbytes for name in packed)
        rest = sum(model.entries[name].nbytes for name in model.shapes if name not in entries)
        whole = rest + sum(entry.nbytes for entry in entries.values())
        size = rest + sum((checkpoint.path / name).stat().st_size for name in checkpoint.hashes)
    return Sizes(8 * stored / model.count(binarized), 8 * whole / parameters, size)


def perplexities(
    model: SourceModel,
    checkpoint: Checkpoint | None,
    sets: dict[str, Tensor],
    batch_size: int,
    folder: Path | None,
    reporter: Reporter,
) -> dict[str, float]:
    """Perplexity of each evaluation set: exp of the mean negative log likelihood per predicted token.

    sets: name -> tokens int64 [segments, length]; the first token of a segment is not predicted. folder: where streams lie
    on disk, None for RAM. checkpoint: None for the base model.
    """
    streams: dict[str, HiddenStream] = {}
    try:
        for name, tokens in sets.items():
            streams[name] = embed_stream(model, tokens, folder / f"{name}.bin" if folder else None, batch_size)
        for index in range(model.blocks):
            reporter.begin_block(index)
            block = model.block(index) if checkpoint is None else _stored(model, checkpoint, index)
            for stream in streams.values():
                advance(block, stream, stream, model.device, batch_size)
            reporter.step(index)
        head = model.head()
        return {name: _perplexity(model, head, streams[name], sets[name]) for name in sets}
    finally:
        for stream in streams.values():
            stream.remove()


def _stored(model: SourceModel, checkpoint: Checkpoint, index: int) -> Block:
    return stored_block(model, index, checkpoint.read_block(index), format_of(checkpoint.manifest))


def _perplexity(model: SourceModel, head: torch.nn.Module, stream: HiddenStream, tokens: Tensor) -> float:
    total = 0.0
    for rows in batches(0, stream.rows, 1):
        hidden = stream.data[rows][0, :-1].to(model.device)
        wanted = tokens[rows][0, 1:].to(model.device)
        for start in range(0, hidden.shape[0], _POSITIONS):
            logits = head(hidden[start : start + _POSITIONS]).float()
            total += float(cross_entropy(logits, wanted[start : start + _POSITIONS], reduction="sum"))
    mean = total / (tokens.shape[0] * (tokens.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


def result(model: SourceModel, checkpoint: Checkpoint | None, perplexity: dict[str, float]) -> dict[str, Any]:
    """One entry of results.json."""
    sizes = measure_sizes(model, checkpoint)
    activations = None if checkpoint is None else format_of(checkpoint.manifest)
    return {
        "perplexity": {name: round(value, 4) for name, value in perplexity.items()},
        "bits_per_weight": round(sizes.bits_per_weight, 4),
        "bits_per_parameter": round(sizes.bits_per_parameter, 4),
        "bytes": sizes.bytes,
        "activation_bits": activations.bits if activations else 16,
        "kv_bits": activations.kv_bits if activations else 16,
    }
