"""transformers plugin: `import lbllm_cli.hf`, then `AutoModelForCausalLM.from_pretrained` loads packed exports.

On a CPU the model runs in the compiled kernels, where this installation has them; the environment variable LBLLM_KERNELS chooses
among them (`engine.abi`).

Without the import transformers fails on the shape of the packed weights; it never runs with random ones.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lbllm_cli.format.activations import format_of
from lbllm_cli.format.settings import METHOD, check_settings, group_sizes
from lbllm_cli.runtime.attachments import attach
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.checks import check_files, check_linears, check_placed, check_values
from lbllm_cli.runtime.experts import experts_of, separate_experts
from lbllm_cli.runtime.kv_cache import QuantizedKVCache, keep_quantized
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer, empty_quantizers, quantizer_widths
from lbllm_cli.runtime.rows import restore_rows, stand_for_rows
from lbllm_cli.runtime.softcap import keep_soft_cap
from lbllm_cli.runtime.units import Units, find_units

__all__ = ["LbllmConfig", "LbllmQuantizer", "QuantizedKVCache", "check_packed", "quantize_activations"]

# Mixtures whose folders have experts as modules have them here: a linear each.
_SAVED_AS_HERE = {"qwen3_moe", "olmoe"}


class LbllmConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a packed model.

    Raises ValueError for a format_version or a value that this lbllm does not read.
    """

    def __init__(
        self, group_size: int, linears: list[str], format_version: int, activations: dict[str, Any] | None = None,
        level_bits: int = 8, head_bits: int = 16, group_sizes: dict[str, int] | None = None, **others: Any
    ):  # fmt: skip
        given = {"group_size": group_size, "linears": linears, "format_version": format_version, "level_bits": level_bits}
        check_settings(given | {"activations": activations, "head_bits": head_bits, "group_sizes": group_sizes})
        self.quant_method = METHOD
        self.group_size = group_size
        self.linears = linears
        self.format_version = format_version
        self.activations = activations
        self.level_bits = level_bits
        self.head_bits = head_bits
        self.group_sizes = group_sizes
        for key, value in others.items():
            setattr(self, key, value)

    def to_dict(self) -> dict[str, Any]:
        """As a file has it: without what there is not."""
        return {key: value for key, value in super().to_dict().items() if value is not None}


class LbllmQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts a PackedLinear in the place of every binarized linear before transformers reads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **others: Any) -> None:
        settings = self.quantization_config
        keep_soft_cap(model.config)
        decoder = model.get_decoder()
        for layer in decoder.layers:
            separate_experts(layer)
        self._has_experts = experts_of(decoder.layers[0]) is not None
        check_linears(decoder.layers[0], settings.linears)
        # While linears are transformers' own and hold no values.
        self._units: Units = find_units(decoder, settings.linears)
        layout = format_of(settings.to_dict())
        sizes = group_sizes(settings.to_dict())
        for index, layer in enumerate(decoder.layers):
            own = {name: sizes.of_unit(index, unit) for unit in self._units for name in unit}
            with torch.device("meta"):
                quantizers = empty_quantizers(layer, self._units, layout) if layout else {}
                for name in settings.linears:
                    layer.set_submodule(name, _packed_like(layer.get_submodule(name), own[name], settings.level_bits))
                for name, quantizer in quantizers.items():
                    owner, _, last = name.rpartition(".")
                    layer.get_submodule(owner).add_module(last, quantizer)
        if settings.head_bits != 16:
            stand_for_rows(model)
        if paths := others.get("checkpoint_files"):
            check_files(model, [Path(path) for path in paths])

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Packed experts lie in the folder as modules have them: nothing is put together or renamed.

        transformers 5.20 and newer give the model as well.
        """
        return [] if self._has_experts else weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **others: Any) -> nn.Module:
        check_placed(model)
        check_values(model)
        if self.quantization_config.head_bits != 16:
            restore_rows(model)
            # A folder that this model is saved to has them as the model has.
            self.quantization_config.head_bits = 16
        self._handles: list[Any] = []
        quantized = bool(self.quantization_config.activations)
        layers = model.get_decoder().layers
        if quantized:
            self._handles.append(keep_quantized(model))
            for layer in layers:
                by = {name: layer.get_submodule(name) for name in quantizer_widths(layer, self._units)}
                self._handles += attach(layer, self._units, by)
        devices = {module.weight.device for module in model.modules() if isinstance(module, PackedLinear)}
        if len(devices) == 1:
            self._handles += backend_of(devices.pop()).take_over(model, self._units, quantized)
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
        config: Any = model.config
        if self._has_experts and config.model_type not in _SAVED_AS_HERE:
            model.save_pretrained = _save_experts  # type: ignore[assignment]
        return model

    def is_serializable(self, **others: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _save_experts(*_: Any, **__: Any) -> None:
    """Of a mixture that was dequantized. Raises ValueError: its experts are linears each, transformers looks for them put
    together, and fills what it does not find with chance.
    """
    raise ValueError(
        "a dequantized mixture of this family cannot be saved so that it loads again; take lbllm export with export.format=dense"
    )


def _packed_like(linear: Any, group_size: int, level_bits: int) -> PackedLinear:
    """A packed linear for the place of an ordinary one, without values."""
    shape = linear.in_features, linear.out_features, group_size
    packed = PackedLinear(*shape, bias=linear.bias is not None, level_bits=level_bits)
    if packed.bias is not None:
        packed.bias.data = packed.bias.data.to(linear.weight.dtype)
    return packed


def check_packed(config: Any, files: list[Path]) -> None:
    """Compares the headers of a packed folder's shards with what its configuration says; no weight is read.

    config: transformers' own. Raises ValueError naming what is wrong, UsageError for a damaged shard.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Tied weights are known once they are tied.
    model.tie_weights()
    LbllmQuantizer(LbllmConfig(**config.quantization_config))._process_model_before_weight_loading(model, checkpoint_files=files)


def quantize_activations(model: nn.Module, wanted: bool) -> None:
    """Whether a loaded model quantizes activations, keys and values, as it does by default where its export says how."""
    for module in model.modules():
        if isinstance(module, ActQuantizer):
            module.enabled = wanted


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a second registration would raise
    register_quantization_config(METHOD)(LbllmConfig)
    register_quantizer(METHOD)(LbllmQuantizer)
