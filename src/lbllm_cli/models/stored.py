"""A block as a checkpoint holds it, ready to run."""

from torch import Tensor

from lbllm_cli.format.activations import ActivationFormat
from lbllm_cli.format.names import CENTRE, TENSORS
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.models.block import Block
from lbllm_cli.models.model import SourceModel
from lbllm_cli.runtime.attachments import attach
from lbllm_cli.runtime.backend import weight_on
from lbllm_cli.runtime.quantizer import read_quantizers


def whole_tensors(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a block's stored tensors, those that are neither a part of a packed weight nor of a quantizer."""
    packed, quantizing = set(PackedWeight.owners(stored)), (*TENSORS, CENTRE)
    names = [(name, *name.rpartition(".")[::2]) for name in stored]
    return {name: stored[name] for name, owner, last in names if last not in quantizing and owner not in packed}


def decoded(stored: dict[str, Tensor], model: SourceModel) -> dict[str, Tensor]:
    """Weights of one block of a checkpoint as the model runs with them: packed ones decoded, others as they are.

    stored: under full names. Returns float32 [out, in] under `P.weight`, on the model's device.
    """
    weights = {name: tensor.to(model.device) for name, tensor in whole_tensors(stored).items()}
    for owner in PackedWeight.owners(stored):
        in_features = model.shapes[f"{owner}.weight"][1]
        weights[f"{owner}.weight"] = weight_on(PackedWeight.from_tensors(stored, owner, in_features), model.device).values()
    return weights


def stored_block(model: SourceModel, index: int, stored: dict[str, Tensor], activations: ActivationFormat | None) -> Block:
    """Block `index` as a checkpoint holds it; activations: how it quantizes them, None for not at all."""
    block = model.block(index, decoded(stored, model))
    if activations is not None:
        quantizers = read_quantizers(block.layer, block.units, stored, block.prefix, activations)
        attach(block.layer, block.units, {name: quantizer.to(model.device) for name, quantizer in quantizers.items()})
    return block
