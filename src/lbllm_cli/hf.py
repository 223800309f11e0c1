"""transformers plugin: `import lbllm_cli.hf`, then `AutoModelForCausalLM.from_pretrained` loads packed exports.

On a CPU the model runs in the compiled kernels, where this installation has them; the environment variable LBLLM_KERNELS chooses
among them (`kernels.library`).

Without the import transformers fails on the shape of the packed weights; it never runs with random ones.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lbllm_cli.models.model import UNITS
from lbllm_cli.runtime.attachments import attach, share_inputs
from lbllm_cli.runtime.checks import check_files, check_settings, check_values
from lbllm_cli.runtime.cpu.block import BlockStep, steppable
from lbllm_cli.runtime.cpu.head import HeadLinear
from lbllm_cli.runtime.cpu.library import library
from lbllm_cli.runtime.cpu.unit import Unit, usable
from lbllm_cli.runtime.kv_cache import keep_quantized
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import INPUTS, ActQuantizer, format_of, quantizer_widths

METHOD = "lbllm"


class LbllmConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a packed model.

    Raises ValueError for a format_version or a value that this lbllm does not read.
    """

    def __init__(
        self, group_size: int, linears: list[str], format_version: int, activations: dict[str, Any] | None = None, **others: Any
    ):
        check_settings(
            {"group_size": group_size, "linears": linears, "format_version": format_version, "activations": activations}
        )
        self.quant_method = METHOD
        self.group_size = group_size
        self.linears = linears
        self.format_version = format_version
        self.activations = activations
        for key, value in others.items():
            setattr(self, key, value)


class LbllmQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts a PackedLinear in the place of every binarized linear before transformers reads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **others: Any) -> None:
        wanted = tuple(self.quantization_config.linears)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        found = {name: module for name, module in linears.items() if name.endswith(wanted)}
        with torch.device("meta"):
            for name, module in found.items():
                packed = PackedLinear(
                    module.in_features, module.out_features, self.quantization_config.group_size, module.bias is not None
                )
                if packed.bias is not None:
                    packed.bias.data = packed.bias.data.to(module.weight.dtype)
                model.set_submodule(name, packed)
        if layout := format_of(self.quantization_config.to_dict()):
            for layer in model.get_decoder().layers:
                for name, width in quantizer_widths(layer).items():
                    owner, _, own = name.rpartition(".")
                    with torch.device("meta"):
                        layer.get_submodule(owner).add_module(own, layout.empty(name, width))
        if paths := others.get("checkpoint_files"):
            check_files(model, [Path(path) for path in paths])

    def _process_model_after_weight_loading(self, model: Any, **others: Any) -> nn.Module:
        check_values(model)
        self._handles: list[Any] = []
        if self.quantization_config.activations:
            self._handles.append(keep_quantized(model))
            for layer in model.get_decoder().layers:
                self._handles += attach(layer, {name: layer.get_submodule(name) for name in quantizer_widths(layer)})
        on_cpu = all(module.weight.device.type == "cpu" for module in model.modules() if isinstance(module, PackedLinear))
        if on_cpu and library() is not None:
            self._handles += _use_kernels(model, bool(self.quantization_config.activations))
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        """Replaces every PackedLinear by an ordinary linear with the decoded weight; activations are no longer quantized."""
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for handle in self._handles:
            handle.remove()
        for layer in model.get_decoder().layers:  # type: ignore[operator]
            layer.__dict__.pop("forward", None)
        for name, module in list(model.named_modules()):
            if isinstance(module, ActQuantizer):
                owner, _, own = name.rpartition(".")
                delattr(model.get_submodule(owner), own)
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                dense.weight = nn.Parameter(module.dense_weight().to(wanted or torch.float32), requires_grad=False)
                if module.bias is not None:
                    dense.bias = module.bias
                model.set_submodule(name, dense)
        return model

    def is_serializable(self, **others: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _use_kernels(model: Any, quantized: bool) -> list[Any]:
    """Hands linears, decode steps and the head over to the compiled kernels, where they can take them.

    quantized: whether activations are. Returns handles of hooks.
    """
    handles = []
    for layer in model.get_decoder().layers:
        if not quantized:
            handles += share_inputs(layer)
        units = []
        for names, name in zip(UNITS, INPUTS, strict=True):
            linears = [layer.get_submodule(linear) for linear in names]
            quantizer = layer.get_submodule(name) if quantized else None
            if usable(linears, quantizer):
                units.append(Unit(linears, quantizer))
        if quantized and len(units) == len(UNITS) and steppable(layer):
            layer.forward = BlockStep(layer, units)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.bias is None:
        head.__class__ = HeadLinear
    return handles


def quantize_activations(model: nn.Module, wanted: bool) -> None:
    """Whether a loaded model quantizes activations, keys and values, as it does by default where its export says how."""
    for module in model.modules():
        if isinstance(module, ActQuantizer):
            module.enabled = wanted


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a second registration would raise
    register_quantization_config(METHOD)(LbllmConfig)
    register_quantizer(METHOD)(LbllmQuantizer)
