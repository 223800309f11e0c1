"""A decoder block's decode step in one call of the library."""

from ctypes import byref
from ctypes import pointer as reference
from importlib.metadata import version
from inspect import signature
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lbllm_cli.core.errors import RunError
from lbllm_cli.engine.abi import HEAD_MAX, Block, CacheView, library
from lbllm_cli.format.names import KEYS, VALUES
from lbllm_cli.runtime.attachments import Arguments, plain_attention, taken_proof
from lbllm_cli.runtime.cpu.captured import CapturedModules, CapturedQuantizers
from lbllm_cli.runtime.cpu.library import DTYPES, pointer, quantizer_struct, supported
from lbllm_cli.runtime.cpu.unit import Unit
from lbllm_cli.runtime.kv_cache import RecordLayer, record_bytes
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.runtime.units import Units

# What the step computes: transformers' layers with another order of norms, residuals or scalings go layer by layer. A name is put
# here when tests/native compare the step with that layer.
_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "SeedOssDecoderLayer")
_UNITS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


class _Known(NamedTuple):
    """A block as the library reads it, and what it was made of."""

    block: Block
    reference: Any
    addresses: list[int]
    norms: list[Tensor]
    centre: Tensor | None
    buffers: CapturedQuantizers
    record_bytes: list[int]


class BlockStep:
    """Stands for a decoder layer's `forward`: one new token per row goes through the library, all else through transformers.

    layer: of the Llama family, whose linears are in units. Hidden states [rows, tokens, hidden]. The layer is computed as it is
    now: where a module was replaced, wrapped, overridden or given a hook since, transformers computes it. Raises RunError where
    transformers calls the layer by names that this does not know.
    """

    def __init__(self, layer: nn.Module, units: list[Unit]):
        self.layer = layer
        self.units = units
        self.arguments = Arguments(layer)
        unknown = {"hidden_states", "attention_mask", "position_embeddings"} - set(signature(type(layer).forward).parameters)
        if unknown:
            raise RunError(
                f"{type(layer).__name__} of transformers {version('transformers')} takes no {', '.join(sorted(unknown))}; "
                "install a version that lbllm-cli was tested with"
            )
        attention: Any = layer.self_attn
        found: dict[str, Any] = dict(layer.named_modules())
        self.norms = [found[name] for name in _NORMS if name in found]
        self.attention = attention
        self.cached: list[ActQuantizer] = [found[name] for name in (KEYS, VALUES)]
        self.quantizers = [*(unit.quantizer for unit in units if unit.quantizer is not None), *self.cached]
        self.proof = taken_proof(layer)
        self.shape = {
            "epsilon": float(self.norms[0].variance_epsilon),
            "scaling": float(attention.scaling),
            "hidden": units[0].in_features,
            "head_dim": int(attention.head_dim),
            "heads": units[0].outs[0] // int(attention.head_dim),
            "kv_heads": units[0].outs[1] // int(attention.head_dim),
            "intermediate": units[3].in_features,
        }
        self.widths = [self.units[0].in_features] * 2 + [int(attention.head_dim)] * (len(self.norms) - 2)
        self.linears = [packed for unit in units for packed in unit.linears]
        self.linear_units = [packed.unit for packed in self.linears]
        self.modules = CapturedModules(layer)
        self._block: _Known | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_block": None}

    def _alike(self) -> bool:
        """Whether its modules, being those that were noted, still have the same numbers, and nothing is switched off."""
        attention = self.attention
        if attention.scaling != self.shape["scaling"] or attention.head_dim != self.shape["head_dim"]:
            return False
        for norm in self.norms:
            if norm.variance_epsilon != self.shape["epsilon"]:
                return False
        same = [packed.unit for packed in self.linears] == self.linear_units
        return same and False not in [quantizer.enabled for quantizer in self.quantizers]

    def block(self) -> _Known | None:
        """The block as the library reads it, None where it cannot as it is now. The caller has asked about modules."""
        return self._known() if self._alike() else None

    def _known(self) -> _Known | None:
        """The block as the library reads it: quantizers, norms and biases as the modules have them now. None where a quantizer or
        a norm became one that it does not have.
        """
        addresses = self._addresses()
        if addresses is None:
            return None
        for unit in self.units:
            unit.read_biases()
        known = self._block
        if known is None or addresses != known.addresses or not known.buffers.hold():
            if not all(supported(quantizer.tables, cached=True) for quantizer in self.cached):
                return None
            structs = [unit.structs for unit in self.units]
            by = [quantizer_struct(quantizer.tables, quantizer.size) for quantizer in self.cached]
            inputs: list[Any] = [struct[1] for struct in structs]
            quantizers = [reference(quantizer) for quantizer in (*inputs, *by)]
            norms = [norm._parameters["weight"] for norm in self.norms]
            missing = (None,) * (len(_NORMS) - len(norms))
            dtype, centre = DTYPES[norms[0].dtype], self.cached[0].centre
            fields = (*(struct[0] for struct in structs), *quantizers, *addresses, *missing, pointer(centre))
            block = Block(*fields, **self.shape, norm_dtype=dtype)
            buffers = CapturedQuantizers(self.quantizers)
            groups = (-(-int(self.attention.head_dim) // quantizer.size) for quantizer in self.cached)
            sizes = [count * record_bytes(quantizer) for count, quantizer in zip(groups, self.cached, strict=True)]
            known = self._block = _Known(block, byref(block), addresses, norms, centre, buffers, sizes)
        return known

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = None if args else self._cache_of(self.arguments.cache(args, kwargs))
        angles = kwargs.get("position_embeddings")
        mask = kwargs.get("attention_mask")
        runs = cache is not None and angles is not None and self._runs(hidden_states, mask)
        known = self._known() if runs else None
        if known is None or cache is None or angles is None:
            output = type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
            if self.proof is not None:
                self.proof(self.layer, hidden_states, output)
            return output
        return self._step(known, hidden_states, mask, cache, angles)

    def _cache_of(self, cache: Any) -> RecordLayer | None:
        """This layer's part of a 4-bit cache that holds tokens already."""
        if torch.compiler.is_compiling() or not hasattr(cache, "layers"):
            return None
        attention: Any = self.layer.self_attn
        layer = cache.layers[attention.layer_idx]
        return layer if isinstance(layer, RecordLayer) and layer.get_seq_length() and layer.holds_records else None

    def _runs(self, x: Tensor, mask: Tensor | None) -> bool:
        """One token per row, nothing switched off, nothing edited, nobody listening to what goes on inside; attention as it is
        everywhere, with one mask for all heads.
        """
        config: Any = self.attention.config
        if not plain_attention(config) or (mask is not None and mask.dim() == 4 and mask.shape[1] != 1):
            return False
        fits = x.dim() == 3 and x.shape[1] == 1 and x.dtype in DTYPES and x.device.type == "cpu" and not torch.is_grad_enabled()
        return fits and self.modules.hold() and self._alike()

    def _addresses(self) -> list[int] | None:
        """Where the library reads the norms' weights as they lie; None where it cannot."""
        weights = [norm._parameters["weight"] for norm in self.norms]
        addresses = [0 if weight is None else weight.data_ptr() for weight in weights]
        known = self._block
        if known is not None and addresses == known.addresses and all(map(is_, weights, known.norms)):
            return addresses
        dtypes = {weight.dtype for weight in weights if weight is not None}
        fit = all(
            weight is not None and weight.device.type == "cpu" and weight.is_contiguous() and weight.shape == (width,)
            for weight, width in zip(weights, self.widths, strict=True)
        )
        return addresses if fit and len(dtypes) == 1 and dtypes <= DTYPES.keys() else None

    def _step(self, known: _Known, x: Tensor, mask: Tensor | None, cache: RecordLayer, angles: tuple[Tensor, Tensor]) -> Tensor:
        lib = library()
        assert lib is not None
        rows, tokens, kv_heads = x.shape[0], cache.get_seq_length(), self.shape["kv_heads"]
        own = known.record_bytes
        if x.shape[2] != self.shape["hidden"]:
            raise ValueError(f"expected hidden states of width {self.shape['hidden']}, got {x.shape[2]}")
        if [*cache.keys.shape, *cache.values.shape] != [rows, kv_heads, tokens, own[0], rows, kv_heads, tokens, own[1]]:
            cache.check(rows, int(kv_heads), int(self.shape["head_dim"]))
        cosine, sine = (_of_rows(t, rows, int(self.shape["head_dim"]), x.dtype) for t in angles)
        added = None if mask is None else _added(mask, rows, tokens + 1)
        keys, values = cache.grown(1)
        strides = (*keys.stride()[:2], *values.stride()[:2])
        sizes = (rows, keys.shape[1], keys.shape[3], values.shape[3])
        view = CacheView(keys.data_ptr(), values.data_ptr(), *strides, tokens, pointer(added), *sizes)
        x = x.contiguous()
        out = torch.empty_like(x)
        addresses = (x.data_ptr(), out.data_ptr(), cosine.data_ptr(), sine.data_ptr())
        lib.lbllm_block_step(known.reference, byref(view), *addresses, DTYPES[x.dtype], rows, torch.get_num_threads())
        return out


def _of_rows(angles: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """cos or sin [rows or 1, 1, head_dim] for every row."""
    if angles.shape not in ((rows, 1, width), (1, 1, width)):
        raise ValueError(f"expected cos and sin of shape {(rows, 1, width)}, got {tuple(angles.shape)}")
    fits = angles.shape[0] == rows and angles.dtype == dtype
    return angles.contiguous() if fits else angles.to(dtype).expand(rows, 1, -1).contiguous()


def _added(mask: Tensor, rows: int, tokens: int) -> Tensor:
    """transformers' mask, boolean or additive, [rows or 1, 1, 1, tokens] as what is added to scores: float32 [rows, tokens]."""
    if mask.dim() != 4 or mask.shape[0] not in (1, rows) or mask.shape[2] < 1 or mask.shape[3] < tokens:
        raise ValueError(f"expected an attention mask of shape {(rows, 1, 1, tokens)}, got {tuple(mask.shape)}")
    last = mask[:, 0, -1, -tokens:].expand(rows, tokens)
    if last.dtype == torch.bool:
        return torch.zeros(rows, tokens).masked_fill_(~last, torch.finfo(torch.float32).min / 2)
    return last.float().clamp(min=torch.finfo(torch.float32).min / 2).contiguous()


def steppable(layer: nn.Module, units: Units) -> bool:
    """Whether a decoder layer is one that the library knows."""
    if type(layer).__name__ not in _LAYERS or units != _UNITS:
        return False
    attention: Any = layer.self_attn
    activation = type(getattr(layer.get_submodule("mlp"), "act_fn", None)).__name__
    cached: list[Any] = [layer.get_submodule(name) for name in (KEYS, VALUES)]
    small = int(attention.head_dim) <= HEAD_MAX and all(quantizer.size % 2 == 0 for quantizer in cached)
    return small and activation in ("SiLU", "SiLUActivation") and all(supported(q.tables, cached=True) for q in cached)
