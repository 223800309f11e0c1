"""Activation quantizers of a decoder block: one per distinct input of its linears, one for keys and one for values.

`attachments.attach` puts them into a block, be it in training, in evaluation or in an exported model.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lbllm_cli.format.activations import Tables, join_groups, split_groups
from lbllm_cli.models.model import UNITS
from lbllm_cli.runtime.cpu.quantizer import quantized
from lbllm_cli.runtime.shared_input import once, plain

# The inputs of a unit belong to its first linear; keys and values are quantized by the attention layer.
INPUTS = tuple(f"{unit[0]}.input" for unit in UNITS)
KEYS, VALUES = "self_attn.key_cache", "self_attn.value_cache"
TENSORS = ("act_levels", "act_zero", "act_clip")
# Steps of keys and values are stored in the cache: 2 bytes, with the range of float32.
KV_STEP = torch.bfloat16
CLIP_UNIT = 65536


@dataclass(frozen=True)
class ActivationFormat:
    """How the activations of a checkpoint are quantized.

    bits, kv_bits: 3 to 8. granularity: a step per token and group, or per token. form, kv_form: see `ops.actquant`. tables: of
    a knee quantizer. group_size: inputs in a group; that of the weights. Keys and values have a step per token, head and group.
    """

    bits: int
    kv_bits: int
    granularity: Literal["group", "token"]
    form: Literal["knee", "uniform"]
    kv_form: Literal["knee", "uniform"]
    tables: int
    group_size: int

    def size(self, width: int) -> int:
        """Values that share a step, of an input with `width` channels."""
        return self.cache_size(width) if self.granularity == "group" else width

    def cache_size(self, width: int) -> int:
        """Values that share a step, of keys or values with `width` channels per head."""
        return min(self.group_size, width)

    def empty(self, name: str, width: int) -> "ActQuantizer":
        """A quantizer of the right shapes for the input `name`, to be filled by a loader."""
        cached = name in (KEYS, VALUES)
        bits, form = (self.kv_bits, self.kv_form) if cached else (self.bits, self.form)
        count = self.tables if form == "knee" else 1
        zero = torch.zeros(count, dtype=torch.uint8) if form == "knee" else None
        tables = Tables(torch.zeros(count, 2**bits, dtype=torch.uint8), zero, torch.ones(count, 2))
        size = self.cache_size(width) if cached else self.size(width)
        return ActQuantizer(tables, size, KV_STEP if cached else torch.float32)

    def as_dict(self) -> dict[str, Any]:
        """For manifests and config.json."""
        return asdict(self)


def stored_clip(clip: Tensor) -> Tensor:
    """Clipping factors as they are stored: float [...] -> int32 [...], in units of 2^-16."""
    return (clip * CLIP_UNIT).round().to(torch.int32)


def format_of(manifest: dict[str, Any]) -> ActivationFormat | None:
    """Of a stage's manifest or a packed model's quantization_config; None where activations are in full precision."""
    values = manifest.get("activations")
    return ActivationFormat(**values) if values else None


class ActQuantizer(nn.Module):
    """Quantizes the last axis: [..., width] -> values that the codes stand for, in the input's dtype.

    act_levels: uint8 [tables, 2^bits]. act_zero: uint8 [tables], empty in the uniform form. act_clip: int32 [tables, 2], in
    units of 2^-16: loaders that cast a model's floats leave it alone. size: values that share a step. step_dtype: what steps
    are stored in.
    """

    act_levels: Tensor
    act_zero: Tensor
    act_clip: Tensor

    def __init__(self, tables: Tables, size: int, step_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.size = size
        self.step_dtype = step_dtype
        self.enabled = True
        self.register_buffer("act_levels", tables.levels)
        self.register_buffer("act_zero", tables.levels.new_empty(0) if tables.zero is None else tables.zero)
        self.register_buffer("act_clip", stored_clip(tables.clip))

    @property
    def tables(self) -> Tables:
        """What the quantizer knows before it sees data."""
        clip = self.act_clip.float() / CLIP_UNIT
        return Tables(self.act_levels, self.act_zero if self.act_zero.numel() else None, clip)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.act_levels.shape[1] - 1).bit_length()

    def values(self, x: Tensor) -> Tensor:
        """Groups [..., size] -> the values of their codes, float32."""
        return quantized(x, self.tables, self.step_dtype).values

    def forward(self, x: Tensor) -> Tensor:
        # Linears that read one input call in turn; it is quantized once.
        return once(x, self, self._quantized) if self.enabled else plain(x)

    def _quantized(self, x: Tensor) -> Tensor:
        return join_groups(self.values(split_groups(x, self.size)), x.shape[-1]).to(x.dtype)


def quantizer_widths(layer: nn.Module) -> dict[str, int]:
    """Channels of each quantizer's input: of its linear, or per head."""
    attention: Any = layer.get_submodule("self_attn")
    linears: list[Any] = [layer.get_submodule(unit[0]) for unit in UNITS]
    widths = {name: int(linear.in_features) for linear, name in zip(linears, INPUTS, strict=True)}
    return widths | {KEYS: int(attention.head_dim), VALUES: int(attention.head_dim)}


def read_quantizers(layer: nn.Module, tensors: dict[str, Tensor], prefix: str, layout: ActivationFormat) -> dict[str, nn.Module]:
    """Quantizers of a decoder layer from its checkpoint's tensors, by name in the block. prefix: of the block's tensors."""
    found: dict[str, nn.Module] = {}
    for name, width in quantizer_widths(layer).items():
        quantizer = layout.empty(name, width)
        quantizer.load_state_dict({part: tensors[f"{prefix}{name}.{part}"] for part in TENSORS}, assign=True)
        found[name] = quantizer
    return found
