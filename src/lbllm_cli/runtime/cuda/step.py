"""A decoder's decode step, one new token per row: all its layers in kernels, replayed as one CUDA graph."""

from collections import OrderedDict
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from lbllm_cli.runtime.attachments import CACHE_ARGUMENTS, Arguments, plain_attention
from lbllm_cli.runtime.cpu.captured import CapturedModules
from lbllm_cli.runtime.cuda.activations import TYPES
from lbllm_cli.runtime.cuda.fused import norm
from lbllm_cli.runtime.cuda.graph import Replayed, capturable
from lbllm_cli.runtime.cuda.known import Held, Known
from lbllm_cli.runtime.cuda.layer import StepBuffers, StepLayer, steppable, weight_of
from lbllm_cli.runtime.cuda.rooms import kept_rooms, rooms_for
from lbllm_cli.runtime.cuda.unit import CudaUnit
from lbllm_cli.runtime.kv_cache import RecordLayer
from lbllm_cli.runtime.units import Units

# transformers' decoders that are an embedding, their layers and a norm, and nothing else.
_DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
# Graphs that are kept: of caches that are used in turn.
_KEPT = 4
# What the step reads of a call; whatever else has a value is for transformers.
_READ = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "cache_position", *CACHE_ARGUMENTS}
# Rotary embeddings of these kinds look at positions, and wait for the device.
_LOOKING = ("dynamic", "longrope")

Room = tuple[Tensor, Tensor]


class _Pass(NamedTuple):
    """A graph, and the tensors that it works in. tokens: that its rooms hold. known: what it was captured with."""

    buffers: StepBuffers
    replayed: Replayed[list[Room]]
    tokens: int
    known: Known


class _Call(NamedTuple):
    """A pass that the step can compute. found: what the last step was computed in, where the cache is the same."""

    ids: Tensor
    positions: Tensor | None
    mask: Tensor | None
    cache: Any
    layers: list[RecordLayer]
    held: int
    found: _Pass | None


class DecodeStep:
    """Stands for a decoder's `forward`: one new token per row goes through the kernels, all else through transformers.

    decoder: of the Llama family, the module that has `layers`. units: of each layer, as `StepLayer` takes them. It is computed as
    it is now: where a module was replaced, wrapped, overridden or given a hook since, transformers computes the pass.
    """

    def __init__(self, decoder: Any, units: list[list[CudaUnit]]):
        self.decoder = decoder
        self.arguments = Arguments(decoder)
        self.names = list(signature(type(decoder).forward).parameters)[1:]
        self.layers = [StepLayer(layer, its) for layer, its in zip(decoder.layers, units, strict=True)]
        self.linears = [packed for its in units for unit in its for packed in unit.linears]
        self.linear_units = [packed.unit for packed in self.linears]
        self.units = [unit for its in units for unit in its]
        self.biased: list[CudaUnit] = []
        self.quantizers = [quantizer for layer in self.layers for quantizer in layer.quantizers]
        self.norms: list[Any] = [*(norm for layer in self.layers for norm in layer.norms), decoder.norm]
        self.device = units[0][0].weights.words.device
        self.looks = any(kind in str(getattr(decoder.rotary_emb, "rope_type", "")) for kind in _LOOKING)
        self.modules = CapturedModules(decoder)
        self._forget()

    def _forget(self) -> None:
        """Graphs, and what they read."""
        self._known: Known | None = None
        self._passes: OrderedDict[Any, _Pass] = OrderedDict()
        self._last: tuple[Held, _Pass] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None, "_passes": OrderedDict(), "_last": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call({**dict(zip(self.names, args, strict=False)), **kwargs})
        if call is None or not self._ready():
            return type(self.decoder).forward(self.decoder, *args, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self._step(call), past_key_values=call.cache)

    def _call(self, given: dict[str, Any]) -> _Call | None:
        """The pass that is asked for, None where it is another than the step's."""
        ids, cache = given.get("input_ids"), self.arguments.cache((), given)
        if ids is None or cache is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.decoder.training:
            return None
        if ids.dim() != 2 or ids.shape[1] != 1 or ids.device != self.device or self._asks_for_more(given):
            return None
        rows, layers, last = len(ids), list(getattr(cache, "layers", None) or []), self._last
        if len(layers) != len(self.layers) or not all(isinstance(layer, RecordLayer) for layer in layers):
            return None
        found = last[1] if last is not None and last[0].still(layers) else None
        if found is None and not self._has_records(layers):
            return None
        held = layers[0].keys.shape[2]
        if len(layers[0].keys) != rows:
            return None
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        if positions is not None and positions.shape not in ((rows, 1), (1, 1)):
            return None
        # Of four axes it is the caller's own.
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape == (rows, held + 1)):
            return None
        return _Call(ids, positions, mask, cache, layers, held, found)

    def _asks_for_more(self, given: dict[str, Any]) -> bool:
        """Whether a call wants what the step has not."""
        config, used = self.decoder.config, given.get("use_cache")
        if given.get("return_dict") is False or not (config.use_cache if used is None else used):
            return True
        if not plain_attention(config):
            return True
        if getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False):
            return True
        return any(value is not None and value is not False for name, value in given.items() if name not in _READ)

    def _has_records(self, layers: list[RecordLayer]) -> bool:
        """Whether layers of a cache hold as many tokens each, in records of the decoder's form."""
        if not all(layer.holds_records and layer.keys.numel() for layer in layers):
            return False
        rows, _, held, _ = layers[0].keys.shape
        for layer, own in zip(layers, self.layers, strict=True):
            shapes = [(rows, own.kv_heads, held, size) for size in own.record_bytes]
            if [layer.keys.shape, layer.values.shape] != shapes or layer.keys.device != self.device:
                return False
        return True

    def _tensors(self) -> list[Tensor | None]:
        """What the kernels read where it lies, as the modules have it now."""
        rotary = [] if self.looks else self.decoder.rotary_emb._buffers.values()
        weights = (weight_of(module) for module in (self.decoder.embed_tokens, *self.norms))
        biases = (packed._parameters.get("bias") for packed in self.linears)
        return [*weights, *rotary, *biases, *(unit.bias for unit in self.biased)]

    def _numbers(self) -> list[float]:
        """What else the kernels were told."""
        scaling = getattr(self.decoder.rotary_emb, "attention_scaling", 1.0)
        count = self.decoder.config.num_hidden_layers
        return [count, scaling, self.norms[-1].variance_epsilon, *(number for layer in self.layers for number in layer.numbers())]

    def _ready(self) -> bool:
        """Whether nothing was edited that the kernels cannot follow; what they can is read anew."""
        if not self.modules.hold() or [packed.unit for packed in self.linears] != self.linear_units:
            return False
        if False in [quantizer.enabled for quantizer in self.quantizers]:
            return False
        if self._known is not None and self._known.holds(self._tensors(), self._numbers()):
            return True
        self._forget()
        dtype, count = self._dtype(), self.decoder.config.num_hidden_layers
        if dtype is None or count != len(self.layers) or not all(layer.fits(dtype, self.device) for layer in self.layers):
            return False
        for layer in self.layers:
            layer.read_tables()
        self.biased = [unit for unit in self.units if unit.bias is not None]
        self._known = Known(self._tensors(), self._numbers(), self.quantizers)
        return True

    def _dtype(self) -> torch.dtype | None:
        """Of hidden states, None where the kernels do not have it or the embedding and the last norm differ in it."""
        table, last = weight_of(self.decoder.embed_tokens), weight_of(self.norms[-1])
        if table is None or last is None or last.shape != (table.shape[1],) or not last.is_contiguous():
            return None
        alike = table.dtype == last.dtype and table.device == last.device == self.device
        return table.dtype if alike and table.dtype in TYPES else None

    def _step(self, call: _Call) -> Tensor:
        """Hidden states after the last norm, [rows, 1, hidden]; the cache holds one token more."""
        found = call.found
        if found is not None and found.known is self._known and call.held < found.tokens:
            rooms = [kept_rooms(layer) for layer in call.layers]
        else:
            rooms = [rooms_for(layer, 1) for layer in call.layers]
            found = self._pass(len(call.ids), rooms)
        b = found.buffers
        b.ids.copy_(call.ids)
        b.length.fill_(call.held)
        if call.positions is None:
            b.positions.fill_(call.held)
        else:
            b.positions.copy_(call.positions)
        if call.mask is not None:
            b.mask[:, : call.held + 1].copy_(call.mask)
        elif b.masks:
            b.mask.fill_(True)
        b.masks = call.mask is not None
        if self.looks:
            self._turn(b)
        found.replayed(rooms)
        out = b.out.unsqueeze(1).clone()
        # While the device computes.
        for layer in call.layers:
            layer.grown(1)
        self._last = Held(call.layers), found
        return out

    def _pass(self, rows: int, rooms: list[Room]) -> _Pass:
        """What was captured for these rooms, or is going to be."""
        tokens = rooms[0][0].shape[2]
        key = (rows, tokens, *(part.data_ptr() for room in rooms for part in room))
        found = self._passes.get(key)
        if found is None:
            dtype, captures = self._dtype(), capturable(self.layers[0].units[0].weights.words)
            assert dtype is not None
            assert self._known is not None
            # Buffers of inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                buffers = StepBuffers(self.layers, rows, tokens, dtype, self.device)
            replayed = Replayed(partial(self._compute, buffers), self.device, captures)
            found = self._passes[key] = _Pass(buffers, replayed, tokens, self._known)
            while len(self._passes) > _KEPT:
                self._passes.popitem(last=False)
        else:
            self._passes.move_to_end(key)
        return found

    def _turn(self, b: StepBuffers) -> None:
        """Cos and sin of the positions, as transformers has them."""
        for kept, found in zip(b.angles, self.decoder.rotary_emb(b.out.unsqueeze(1), b.positions), strict=True):
            kept.copy_(found.squeeze(1))

    def _compute(self, b: StepBuffers, rooms: list[Room]) -> None:
        """All launches of a step, from token ids to `b.out`."""
        table, last = weight_of(self.decoder.embed_tokens), self.norms[-1]
        assert table is not None
        if not self.looks:
            self._turn(b)
        hidden = embedding(b.ids, table).squeeze(1)
        for layer, (keys, values) in zip(self.layers, rooms, strict=True):
            layer.run(b, hidden, keys, values)
        norm(hidden, last.weight, last.variance_epsilon, b.out)


def decoder_steppable(decoder: Any, units: Units) -> bool:
    """Whether a decoder is one that the kernels know: of full attention, and nothing scaled."""
    table = getattr(decoder, "embed_tokens", None)
    if type(decoder).__name__ not in _DECODERS or type(table) is not nn.Embedding or table.max_norm is not None:
        return False
    sliding = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=decoder.config).layers)
    return not sliding and all(steppable(layer, units) for layer in decoder.layers)
