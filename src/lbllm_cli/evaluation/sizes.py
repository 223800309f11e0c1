"""Bits and bytes, counted from files; one entry of results.json."""

from dataclasses import dataclass
from math import prod
from typing import Any

from lbllm_cli.core.headers import TensorEntry
from lbllm_cli.format.activations import ActivationFormat
from lbllm_cli.models.model import SourceModel


@dataclass(frozen=True)
class Sizes:
    """Sizes counted from the files.

    bits_per_weight: bits of the binarized linears over their weights (16-bit source: 16). bits_per_parameter: the same for
    the whole model, tied embeddings once. Both are of what is measured: of a float32 file that is computed in bfloat16 each value
    counts 16. bytes: the weight files as they are; for a stage, its block files and the rest of the model.
    """

    bits_per_weight: float
    bits_per_parameter: float
    bytes: int


def measure_sizes(model: SourceModel, entries: dict[str, TensorEntry] | None, size: int) -> Sizes:
    """Sizes of the base model, or of a checkpoint or an export with what it takes from the base model.

    entries: of its tensors by name, None for the base model. size: of the files that hold them, bytes.
    """
    entries = {name: model.entries[name] for name in model.shapes} if entries is None else entries
    owners = {name.removesuffix(".weight") for name in model.binarized_names}
    packed = [name for name in entries if name.rpartition(".")[0] in owners and not name.endswith(".bias")]
    others = {name: model.entries[name] for name in model.shapes if name not in entries}
    run = {name: _bytes_as_run(model, name, entry) for name, entry in {**others, **entries}.items()}
    bits, whole = 8 * sum(run[name] for name in packed), 8 * sum(run.values())
    rest = sum(entry.nbytes for entry in others.values())
    return Sizes(bits / model.binarized_parameters, whole / model.count(list(model.shapes)), rest + size)


def _bytes_as_run(model: SourceModel, name: str, entry: TensorEntry) -> int:
    """Of a tensor of the source's, which is rounded to the dtype that the model is computed in; codes and tables are not."""
    return min(entry.nbytes, prod(entry.shape) * model.dtype.itemsize) if name in model.shapes else entry.nbytes


def result(sizes: Sizes, activations: ActivationFormat | None, texts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One entry of results.json. texts: text -> `perplexity.Measured.as_dict()`."""
    kinds = ("kl", "top1", "routing")
    beside = {key: {name: round(found[key], 6) for name, found in texts.items() if key in found} for key in kinds}
    return {
        "perplexity": {name: round(found["perplexity"], 4) for name, found in texts.items()},
        **{key: values for key, values in beside.items() if values},
        "bits_per_weight": round(sizes.bits_per_weight, 4),
        "bits_per_parameter": round(sizes.bits_per_parameter, 4),
        "bytes": sizes.bytes,
        "activation_bits": activations.bits if activations else 16,
        "kv_bits": activations.kv_bits if activations else 16,
    }
