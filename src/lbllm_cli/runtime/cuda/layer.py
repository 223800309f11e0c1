"""One layer of a decode step: what the kernels read of its modules, and the ten launches that compute it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.format.names import KEYS, VALUES
from lbllm_cli.runtime.cuda.activations import QuantizerTables
from lbllm_cli.runtime.cuda.attention import attend_records, join_and_quantize, parts_of
from lbllm_cli.runtime.cuda.fused import gate_and_quantize, norm_and_quantize
from lbllm_cli.runtime.cuda.records import RecordTables, append_records, recordable
from lbllm_cli.runtime.cuda.unit import CudaUnit
from lbllm_cli.runtime.kv_cache import record_bytes
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.runtime.units import Units

# What the step computes: transformers' layers with another order of norms, residuals or scalings go layer by layer. A name is put
# here when tests/runtime/cuda compare the step with that layer.
_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_UNITS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


def weight_of(module: Any) -> Any:
    """A module's weight as it is now, None where it has none: past nn.Module's slower way to it."""
    return module._parameters.get("weight")


class StepBuffers:
    """What a step works in, for some rows and a capacity of the cache; it stays where it is.

    ids, positions: int64 [rows, 1]. length: int32 [1], tokens in the cache. mask: bool [rows, capacity], which are attended to;
    masks: whether any may not be. angles: cos and sin, [rows, head_dim]. out: [rows, hidden].
    """

    def __init__(self, layers: Sequence["StepLayer"], rows: int, capacity: int, dtype: torch.dtype, device: torch.device):
        def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        layer = layers[0]
        heads, kv_heads, width = layer.heads, layer.kv_heads, layer.head_dim
        parts = parts_of(rows, kv_heads, capacity)
        self.ids, self.positions = (torch.zeros(rows, 1, dtype=torch.int64, device=device) for _ in range(2))
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        self.mask = torch.ones(rows, capacity, dtype=torch.bool, device=device)
        self.masks = False
        self.angles = empty(rows, width), empty(rows, width)
        widest = [max(unit.weights.padded_width for unit in alike) for alike in zip(*(its.units for its in layers), strict=True)]
        self._places = [empty(rows * places, kind=torch.int8) for places in widest]
        self._steps = [empty(rows, unit.steps, kind=torch.float32) for unit in layer.units]
        self.qkv, self.gate_up = (empty(rows, unit.weights.rows) for unit in (layer.units[0], layer.units[2]))
        self.query = empty(rows, heads, width)
        self.sums = empty(rows, heads, parts, width, kind=torch.float32)
        self.weights = empty(rows, heads, parts, 2, kind=torch.float32)
        self.out = empty(rows, layer.units[0].weights.in_features)

    def inputs(self, units: list[CudaUnit]) -> list[tuple[Tensor, Tensor]]:
        """T - Z and steps of the inputs of a layer's units: int8 [rows, padded width], float32 [rows, steps]."""
        # Kernels take rows one behind another, and how far they are padded follows from the group size, a layer's own.
        rows = len(self.out)
        widths = [unit.weights.padded_width for unit in units]
        places = [kept[: rows * width].view(rows, width) for kept, width in zip(self._places, widths, strict=True)]
        return list(zip(places, self._steps, strict=True))


class StepLayer:
    """A decoder layer whose linears are in units, of q, k and v, of o, of gate and up, and of down."""

    def __init__(self, layer: nn.Module, units: list[CudaUnit]):
        found: dict[str, Any] = dict(layer.named_modules())
        self.attention = found["self_attn"]
        self.units = units
        self.norms = [found[name] for name in _NORMS if name in found]
        self.cached: list[ActQuantizer] = [found[name] for name in (KEYS, VALUES)]
        self.head_dim = int(self.attention.head_dim)
        self.heads, self.kv_heads = (out // self.head_dim for out in units[0].weights.outs[:2])
        self.widths = [units[0].weights.in_features] * 2 + [self.head_dim] * (len(self.norms) - 2)
        # Of a token and head, of keys and of values.
        self.record_bytes = [-(-self.head_dim // quantizer.size) * record_bytes(quantizer) for quantizer in self.cached]
        self.tables: tuple[RecordTables, RecordTables] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tables": None}

    @property
    def quantizers(self) -> list[ActQuantizer]:
        """Of inputs, keys and values."""
        return [*(unit.quantizer for unit in self.units if unit.quantizer is not None), *self.cached]

    def numbers(self) -> list[float]:
        """What else of its modules goes into the kernels, as it is now."""
        return [*(norm.variance_epsilon for norm in self.norms), self.attention.scaling, self.attention.head_dim]

    def fits(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernels can read its norms and quantizers as they are now."""
        for norm, width in zip(self.norms, self.widths, strict=True):
            weight = weight_of(norm)
            if weight is None or weight.dtype != dtype or weight.device != device or not weight.is_contiguous():
                return False
            if weight.shape != (width,):
                return False
        sizes = [-(-self.head_dim // quantizer.size) * record_bytes(quantizer) for quantizer in self.cached]
        inputs = [unit.tables for unit in self.units]
        alike = sizes == self.record_bytes and self.attention.head_dim == self.head_dim
        return alike and all(tables is not None and tables.in_bytes for tables in inputs)

    def read_tables(self) -> None:
        """Of keys and values, as their quantizers have them now."""
        keys, values = (RecordTables.of(by.tables, by.size, by.centre) for by in self.cached)
        self.tables = keys, values

    def run(self, b: StepBuffers, hidden: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes what the layer makes of hidden states [rows, hidden] to them, and the new token's records to the rooms."""
        assert self.tables is not None
        first, second, *of_heads = self.norms
        qkv, o, gate_up, down = self.units
        inputs = b.inputs(self.units)
        norm_and_quantize(hidden, weight_of(first), first.variance_epsilon, *_form(qkv), *inputs[0])
        qkv.linear_quantized(*inputs[0], b.qkv)
        norms = (*map(weight_of, of_heads), of_heads[0].variance_epsilon) if of_heads else None
        append_records(b.qkv, b.angles, norms, b.length, self.tables, b.query, keys, values)
        mask = b.mask.view(torch.uint8)
        attend_records(b.query, keys, values, mask, b.length, self.tables, self.attention.scaling, b.sums, b.weights)
        join_and_quantize(b.query, b.sums, b.weights, b.length, *_form(o), *inputs[1])
        o.linear_quantized(*inputs[1], hidden, hidden)
        norm_and_quantize(hidden, weight_of(second), second.variance_epsilon, *_form(gate_up), *inputs[2])
        gate_up.linear_quantized(*inputs[2], b.gate_up)
        gate_and_quantize(b.gate_up, *_form(down), *inputs[3])
        down.linear_quantized(*inputs[3], hidden, hidden)


def _form(unit: CudaUnit) -> tuple[QuantizerTables, int]:
    """Tables of a unit's input, and values that share a step."""
    tables, quantizer = unit.tables, unit.quantizer
    assert tables is not None
    assert quantizer is not None
    return tables, quantizer.size


def steppable(layer: nn.Module, units: Units) -> bool:
    """Whether a decoder layer is one that the kernels know."""
    if type(layer).__name__ not in _LAYERS or units != _UNITS:
        return False
    attention: Any = layer.self_attn
    activation = type(getattr(layer.get_submodule("mlp"), "act_fn", None)).__name__
    cached: list[Any] = [layer.get_submodule(name) for name in (KEYS, VALUES)]
    forms = {(quantizer.size, quantizer.act_levels.shape, quantizer.act_zero.shape) for quantizer in cached}
    known = len(forms) == 1 and all(recordable(quantizer.tables, quantizer.size) for quantizer in cached)
    return known and int(attention.head_dim) % 2 == 0 and activation in ("SiLU", "SiLUActivation")
