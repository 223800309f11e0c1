"""What the kernels compute of a loaded packed model."""

from typing import Any

from torch import nn

from lbllm_cli.format.names import input_name
from lbllm_cli.runtime.attachments import share_inputs
from lbllm_cli.runtime.cuda.head_linear import HeadLinear
from lbllm_cli.runtime.cuda.step import DecodeStep, decoder_steppable
from lbllm_cli.runtime.cuda.unit import CudaUnit, unit_of
from lbllm_cli.runtime.notices import say_in_torch, say_layer_by_layer
from lbllm_cli.runtime.units import Units


class _Standing:
    """A handle of a module's forward that was replaced."""

    def __init__(self, module: nn.Module):
        self.module = module

    def remove(self) -> None:
        """Puts the module's own back."""
        self.module.__dict__.pop("forward", None)


def take_over(model: Any, units: Units, quantized: bool) -> list[Any]:
    """Puts linears into units, and lets kernels compute decode steps and the head; returns handles that take hooks back.

    quantized: whether the model quantizes activations.
    """
    decoder, handles, taken = model.get_decoder(), [], []
    for layer in decoder.layers:
        handles += [] if quantized else share_inputs(layer, units)
        taken.append(_units_of(layer, units, quantized))
    # A layer whose linears are not all in units is none that is known.
    left = [names for its in taken for names, unit in zip(units, its, strict=True) if unit is None]
    if quantized and left:
        say_in_torch(type(decoder.layers[0]).__name__, left[0][0])
    elif quantized and decoder_steppable(decoder, units):
        decoder.forward = DecodeStep(decoder, [[unit for unit in its if unit is not None] for its in taken])
        handles.append(_Standing(decoder))
    elif quantized:
        say_layer_by_layer(type(decoder.layers[0]).__name__)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.bias is None:
        model.set_output_embeddings(HeadLinear.of(head))
    return handles


def _units_of(layer: nn.Module, units: Units, quantized: bool) -> list[CudaUnit | None]:
    """None in the place of one that the kernels cannot run."""
    found: list[CudaUnit | None] = []
    for names in units:
        linears: list[Any] = [layer.get_submodule(name) for name in names]
        by: Any = layer.get_submodule(input_name(names)) if quantized else None
        found.append(unit_of(linears, by))
    return found
