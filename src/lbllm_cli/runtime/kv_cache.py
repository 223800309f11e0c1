"""A transformers cache that holds keys and values as codes, in the records of `format.kv_record`.

Everything that transformers does to a cache (growing, sliding, cropping, reordering for beams,
repeating for batches) it does to records, with its own code.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lbllm_cli.format import kv_record
from lbllm_cli.runtime.attachments import Arguments, meet
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.quantizer import ActQuantizer


def write_record(x: Tensor, quantizer: ActQuantizer) -> Tensor:
    """Records of keys or values by a quantizer; see `format.kv_record`."""
    return backend_of(x.device).records(x, quantizer.tables, quantizer.size)


def read_record(records: Tensor, quantizer: ActQuantizer, width: int) -> Tensor:
    """Keys or values of records; see `format.kv_record`."""
    return kv_record.read_record(records, quantizer.tables, quantizer.size, width)


def record_bytes(quantizer: ActQuantizer) -> int:
    """Bytes of one group."""
    return kv_record.record_bytes(quantizer.tables, quantizer.size)


class _Records:
    """What both kinds of layers add to transformers' own: they keep records in the place of keys and values.

    Where quantizers are switched off as the first tokens come, a layer keeps keys and values as they are, as transformers' own.
    """

    keys: Tensor
    values: Tensor
    keys_by: ActQuantizer
    values_by: ActQuantizer
    is_initialized: bool

    @property
    def holds_records(self) -> bool:
        """Whether what is kept is records: full precision is never uint8."""
        return self.is_initialized and self.keys is not None and self.keys.dtype == torch.uint8

    def check(self, rows: int, heads: int, width: int) -> None:
        """Raises ValueError where tokens of `rows` rows, `heads` key heads and `width` channels cannot follow what is kept."""
        kept = self.keys if self.is_initialized and self.keys is not None and self.keys.numel() else None
        if kept is None:
            return
        if kept.shape[0] != rows:
            remedy = f"repeat it first: cache.batch_repeat_interleave({rows})" if kept.shape[0] == 1 else "give each its own"
            raise ValueError(f"the cache holds {kept.shape[0]} rows, this pass has {rows}; {remedy}")
        sizes = [width, width]
        if self.holds_records:
            sizes = [-(-width // by.size) * record_bytes(by) for by in (self.keys_by, self.values_by)]
        expected = [(rows, heads, kept.shape[2], size) for size in sizes]
        found = [tuple(self.keys.shape), tuple(self.values.shape)]
        if found != expected:
            raise ValueError(f"the cache is not this layer's: expected keys and values of shapes {expected}, got {found}")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keeps the records of new tokens; returns keys and values of all kept ones, decoded: [rows, heads, tokens, head_dim].

        Raises ValueError as `check`, and where quantizers were switched on or off since the first tokens.
        """
        rows, heads, _, width = key_states.shape
        self.check(rows, heads, width)
        holds_tokens = self.is_initialized and self.keys is not None and bool(self.keys.numel())
        if holds_tokens and self.holds_records != self.keys_by.enabled:
            form, now = ("codes", "off") if self.holds_records else ("full precision", "on")
            raise ValueError(
                f"the cache holds keys and values in {form}, and quantization was switched {now} since; begin with a new cache"
            )
        if not self.keys_by.enabled:
            kept: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
            return kept
        meet(self.keys_by)
        meet(self.values_by)
        key_states = self.keys_by.centred(key_states)
        written = (write_record(x, by) for x, by in ((key_states, self.keys_by), (value_states, self.values_by)))
        keys, values = super().update(*written, *args, **kwargs)  # type: ignore[misc]
        dtype = key_states.dtype
        if not holds_tokens and backend_of(key_states.device).kernels is not None:
            # What was just written, without reading it: in torch that is hundreds of launches a layer.
            return self.keys_by.in_dtype(key_states), self.values_by.in_dtype(value_states)
        return read_record(keys, self.keys_by, width).to(dtype), read_record(values, self.values_by, width).to(dtype)


def _grown(kept: Tensor, room: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
    """`kept` [rows, heads, n, bytes] with `tokens` more behind it, and the larger tensor that it is the beginning of."""
    rows, heads, held, size = kept.shape
    begins = room is not None and kept.data_ptr() == room.data_ptr() and kept.stride() == room.stride()
    if room is None or not begins or room.shape[2] < held + tokens or room.shape != (rows, heads, room.shape[2], size):
        # Half as much again: to copy everything for each token costs as much as the attention over it.
        room = kept.new_empty(rows, heads, max(256, held + tokens + held // 2), size)
        room[:, :, :held] = kept
    return room.narrow(2, 0, held + tokens), room


class RecordLayer(_Records, DynamicLayer):  # type: ignore[misc]
    """Full attention."""

    # Without this the class would register itself as transformers' default for its layer type.
    _layer_type = None

    def __init__(self, keys_by: ActQuantizer, values_by: ActQuantizer):
        super().__init__()
        self.keys_by, self.values_by = keys_by, values_by
        self._key_room: Tensor | None = None
        self._value_room: Tensor | None = None

    def grown(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Counts `tokens` more as kept, whose records the caller writes: all records, uint8 [rows, heads, tokens, bytes]."""
        self.keys, self._key_room = _grown(self.keys, self._key_room, tokens)
        self.values, self._value_room = _grown(self.values, self._value_room, tokens)
        return self.keys, self.values


class SlidingRecordLayer(_Records, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Sliding-window attention."""

    _layer_type = None

    def __init__(self, keys_by: ActQuantizer, values_by: ActQuantizer, sliding_window: int):
        super().__init__(sliding_window=sliding_window)
        self.keys_by, self.values_by = keys_by, values_by


def _alike(a: ActQuantizer, b: ActQuantizer) -> bool:
    """Whether both write and read the same records."""
    return a.size == b.size and all(torch.equal(mine, its) for mine, its in zip(a.buffers(), b.buffers(), strict=True))


def _record_layers(model: Any) -> list[Any]:
    """Layers of a cache for a model whose attention layers have quantizers for keys and values."""
    attention = [layer.self_attn for layer in model.get_decoder().layers]
    layers: list[Any] = []
    for module, plain in zip(attention, DynamicCache(config=model.config).layers, strict=True):
        by = (module.key_cache, module.value_cache)
        sliding = isinstance(plain, DynamicSlidingWindowLayer)
        layers.append(SlidingRecordLayer(*by, plain.sliding_window) if sliding else RecordLayer(*by))
    return layers


def _keeps_records(cache: Any) -> bool:
    """Whether a cache has layers that keep records: a QuantizedKVCache, or a caller's own that was given such layers."""
    layers = getattr(cache, "layers", None) or []
    return bool(layers) and isinstance(layers[-1], _Records)


def _read_by(layers: list[Any], model: Any) -> None:
    """Lets records be written and read by the quantizers of `model`: a copied cache has copies of them.

    Raises ValueError where the cache belongs to a model with other tables, or with another number of blocks.
    """
    decoder = model.get_decoder().layers
    # They are bound in order, and this is asked in every pass.
    own, last = decoder[-1].self_attn, layers[-1]
    if last.keys_by is own.key_cache and last.values_by is own.value_cache and len(decoder) == len(layers):
        return
    if len(decoder) != len(layers):
        raise ValueError(f"the cache has {len(layers)} layers, the model {len(decoder)}; begin with a new cache")
    for index, (layer, module) in enumerate(zip(layers, (block.self_attn for block in decoder), strict=True)):
        for name, own in (("keys_by", module.key_cache), ("values_by", module.value_cache)):
            before = getattr(layer, name)
            if before is own:
                continue
            if layer.get_seq_length() and not _alike(before, own):
                raise ValueError(f"block {index}: other quantizers than this model's wrote the cache; begin with a new one")
            setattr(layer, name, own)


class QuantizedKVCache(Cache):  # type: ignore[misc]
    """Cache of a model whose attention layers have quantizers for keys and values: `past_key_values=QuantizedKVCache(model)`,
    from transformers 5.24 on `cache=`. With quantizers switched off it keeps keys and values in full precision.
    """

    def __init__(self, model: Any):
        super().__init__(layers=_record_layers(model))

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(t.nbytes for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values))


def keep_quantized(model: Any) -> Any:
    """Gives `model` a QuantizedKVCache wherever transformers would make its own, in `generate` too. Returns a removable handle.

    A pass with another cache that already holds tokens raises ValueError: their keys and values are in full precision.
    """
    return model.get_decoder().register_forward_pre_hook(_Exchange(model), with_kwargs=True)


class _Exchange:
    """Before a decoder. An object, so that a copied model has one with itself in it."""

    def __init__(self, model: Any):
        self.model = model
        self.arguments = Arguments(model.get_decoder())

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        model, cache, wanted = self.model, self.arguments.cache(args, kwargs), kwargs.get("use_cache")
        wanted = model.config.use_cache if wanted is None else wanted
        if _keeps_records(cache):
            _read_by(cache.layers, model)
            return args, kwargs
        if cache is None and not wanted:
            return args, kwargs
        first = model.get_decoder().layers[0].self_attn
        if not first.key_cache.enabled:
            return args, kwargs
        if cache is not None and (not isinstance(cache, DynamicCache) or cache.get_seq_length()):
            raise ValueError(
                f"this model keeps keys and values in {first.key_cache.bits} bits: expected no cache, an empty DynamicCache or a "
                f"QuantizedKVCache, got {type(cache).__name__}; leave {self.arguments.name} and cache_implementation out"
            )
        if cache is None:
            return self.arguments.with_cache(QuantizedKVCache(model), args, kwargs)
        # The caller's own object gets the layers: it would go on with it, and find it empty at every pass.
        past = any(getattr(layer, "record_past", False) for layer in cache.layers)
        cache.layers[:] = _record_layers(model)
        if past:
            # Who is going to take tokens back has said so to the layers that these stand for.
            cache.activate_past_recording()
        return args, kwargs
