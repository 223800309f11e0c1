"""A decoder block's decode step in one call of the library."""

from ctypes import byref
from ctypes import pointer as reference
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.activations import KEYS, VALUES
from lbllm_cli.kernels.library import DTYPES, Block, CacheView, library, pointer, quantizer_struct, supported
from lbllm_cli.kernels.unit import Unit
from lbllm_cli.kv_cache import RecordLayer

# The library decodes a head's record into a buffer of this many floats.
_HEAD_MAX = 256


class BlockStep:
    """Stands for a decoder layer's `forward`: one new token per row goes through the library, all else through transformers.

    layer: of the Llama family, whose linears are in units. Hidden states [rows, tokens, hidden].
    """

    def __init__(self, layer: nn.Module, units: list[Unit]):
        self.layer = layer
        self.units = units
        attention: Any = layer.self_attn
        names = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        found: dict[str, Any] = dict(layer.named_modules())
        self.norms = [found[name].weight.detach().float() if name in found else None for name in names]
        self.shape = {
            "epsilon": float(found[names[0]].variance_epsilon),
            "scaling": float(attention.scaling),
            "hidden": units[0].in_features,
            "head_dim": int(attention.head_dim),
            "heads": units[0].outs[0] // int(attention.head_dim),
            "kv_heads": units[0].outs[1] // int(attention.head_dim),
            "intermediate": units[3].in_features,
        }
        self.quantizers = [unit.quantizer for unit in units]
        self.hooks = [hooks for name, m in found.items() if name for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.own_hooks = sum(map(len, self.hooks))
        self._block: tuple[Block, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_block": None}

    @property
    def reference(self) -> Any:
        """The block as the library reads it, by reference."""
        if self._block is None:
            weights = [unit.structs[0] for unit in self.units]
            inputs: list[Any] = [unit.structs[1] for unit in self.units]
            cached: list[Any] = [self.layer.get_submodule(name) for name in (KEYS, VALUES)]
            quantizers = [reference(q) for q in (*inputs, *(quantizer_struct(q.tables, q.size) for q in cached))]
            block = Block(*weights, *quantizers, *map(pointer, self.norms), **self.shape)
            self._block = block, byref(block)
        return self._block[1]

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        cache = self._cache_of(past_key_values)
        if cache is None or position_embeddings is None or not self._runs(hidden_states):
            return type(self.layer).forward(
                self.layer,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return self._step(hidden_states, attention_mask, cache, position_embeddings)

    def _cache_of(self, cache: Any) -> RecordLayer | None:
        """This layer's part of a 4-bit cache that holds tokens already."""
        if torch.compiler.is_compiling() or not hasattr(cache, "layers"):
            return None
        attention: Any = self.layer.self_attn
        layer = cache.layers[attention.layer_idx]
        return layer if isinstance(layer, RecordLayer) and layer.get_seq_length() else None

    def _runs(self, x: Tensor) -> bool:
        """One token per row, nothing switched off, nobody listening to what goes on inside."""
        fits = x.shape[1] == 1 and x.dtype in DTYPES and x.device.type == "cpu" and not torch.is_grad_enabled()
        enabled = all(quantizer is not None and quantizer.enabled for quantizer in self.quantizers)
        return fits and enabled and sum(map(len, self.hooks)) == self.own_hooks

    def _step(self, x: Tensor, mask: Tensor | None, cache: RecordLayer, angles: tuple[Tensor, Tensor]) -> Tensor:
        lib = library()
        assert lib is not None
        rows, tokens = x.shape[0], cache.get_seq_length()
        cosine, sine = (_of_rows(t, rows, x.dtype) for t in angles)
        keys, values = cache.grown(1)
        added = None if mask is None else _added(mask, rows, tokens + 1)
        strides = (*keys.stride()[:2], *values.stride()[:2])
        view = CacheView(keys.data_ptr(), values.data_ptr(), *strides, tokens, pointer(added))
        x = x.contiguous()
        out = torch.empty_like(x)
        addresses = (x.data_ptr(), out.data_ptr(), cosine.data_ptr(), sine.data_ptr())
        lib.lbllm_block_step(self.reference, byref(view), *addresses, DTYPES[x.dtype], rows, torch.get_num_threads())
        return out


def _of_rows(angles: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """cos or sin [rows or 1, 1, head_dim] for every row."""
    fits = angles.shape[0] == rows and angles.dtype == dtype
    return angles.contiguous() if fits else angles.to(dtype).expand(rows, 1, -1).contiguous()


def _added(mask: Tensor, rows: int, tokens: int) -> Tensor:
    """transformers' mask, boolean or additive, [rows or 1, 1, 1, tokens] as what is added to scores: float32 [rows, tokens]."""
    last = mask[:, 0, -1, -tokens:].expand(rows, tokens)
    if last.dtype == torch.bool:
        return torch.zeros(rows, tokens).masked_fill_(~last, torch.finfo(torch.float32).min / 2)
    return last.float().clamp(min=torch.finfo(torch.float32).min / 2).contiguous()


def steppable(layer: nn.Module) -> bool:
    """Whether a decoder layer with four units is one that the library knows."""
    attention: Any = layer.self_attn
    activation = type(getattr(layer.get_submodule("mlp"), "act_fn", None)).__name__
    cached: list[Any] = [layer.get_submodule(name) for name in (KEYS, VALUES)]
    small = int(attention.head_dim) <= _HEAD_MAX and all(quantizer.size % 2 == 0 for quantizer in cached)
    return small and activation in ("SiLU", "SiLUActivation") and all(supported(q.tables, cached=True) for q in cached)
