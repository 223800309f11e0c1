"""Keys and values in vLLM as the export quantizes them."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.utils.torch_utils import direct_register_custom_op

from lbllm_cli.format.activations import ActivationFormat
from lbllm_cli.format.names import KEYS, VALUES
from lbllm_cli.runtime.checks import check_values
from lbllm_cli.runtime.quantizer import empty_quantizer
from lbllm_cli.vllm.cache import RecordAttention, record_backend
from lbllm_cli.vllm.linear import LIBRARY, Loaded, add_quantizer, quantizer_parts

_KEYS, _VALUES = (name.rpartition(".")[2] for name in (KEYS, VALUES))


class QuantizedKeysValues(BaseKVCacheMethod):  # type: ignore[misc]
    """Attention of vLLM whose keys and values pass through the export's quantizers before they are kept.

    form: what the cache holds: `values` that codes stand for, in the engine's dtype; `codes`; or `full` precision.
    """

    def __init__(self, config: Any, prefix: str, layout: ActivationFormat, form: str):
        super().__init__(config)
        self.prefix, self.layout, self.form = prefix, layout, form
        self.loaded = Loaded()

    def create_weights(self, layer: nn.Module) -> None:
        """Both quantizers."""
        super().create_weights(layer)
        width: Any = layer.head_size
        heads: Any = layer.num_kv_heads
        for name, own in ((KEYS, _KEYS), (VALUES, _VALUES)):
            add_quantizer(layer, own, empty_quantizer(self.layout, name, width, heads), self.loaded)
        if self.form == "values":
            layer.forward = MethodType(_forward, layer)
        elif self.form == "codes":
            its: Any = layer
            its.impl = RecordAttention(its, its.impl)
            its.attn_backend = record_backend(its.impl.content)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raises ValueError naming what was not loaded, or what has no meaning."""
        super().process_weights_after_loading(layer)
        # vLLM makes it anew to ask it once more, with everything in place.
        loaded: Loaded = layer.quant_method.loaded  # type: ignore[union-attr,assignment]
        loaded.check(quantizer_parts(_KEYS, self.layout.tensors(KEYS)) | quantizer_parts(_VALUES), self.prefix)
        check_values(layer, self.prefix)


def _forward(layer: Any, query: Tensor, key: Tensor | None, value: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """In the place of the attention's own `forward`: vLLM's transformers backend calls that by name, past hooks."""
    # A layer that reads another one's cache has no keys and values of its own.
    if key is not None:
        key = torch.ops.lbllm_vllm.kept(key, layer.layer_name, _KEYS)
    if value is not None:
        value = torch.ops.lbllm_vllm.kept(value, layer.layer_name, _VALUES)
    return type(layer).forward(layer, query, key, value, *args, **kwargs)


def _kept(x: Tensor, layer: str, name: str) -> Tensor:
    module = get_forward_context().no_compile_layers[layer]
    heads = x.view(-1, module.num_kv_heads, 1, module.head_size)
    return getattr(module, name)(heads).view(x.shape)


def _kept_shape(x: Tensor, layer: str, name: str) -> Tensor:
    return torch.empty_like(x)


direct_register_custom_op("kept", _kept, fake_impl=_kept_shape, target_lib=LIBRARY)
