"""Activation quantizers of a decoder block: one per distinct input of its linears, one for keys and one for values.

`attachments.attach` puts them into a block, be it in training, in evaluation or in an exported model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.format.activations import KV_STEP, ActivationFormat, Quantized, Tables, join_groups, split_groups, stored_clip
from lbllm_cli.format.names import CENTRE, CLIP_UNIT, KEYS, VALUES, input_name
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.shared_input import once, plain
from lbllm_cli.runtime.torch.quantizer import quantized as reference
from lbllm_cli.runtime.units import Units


class ActQuantizer(nn.Module):
    """Quantizes the last axis: [..., width] -> values that the codes stand for, in the input's dtype.

    act_levels: uint8 [tables, 2^bits]. act_zero: uint8 [tables], empty in the uniform form. act_clip: int32 [tables, 2], in
    units of 2^-16: loaders that cast a model's floats leave it alone. act_centre: int32 [heads, width], in the same units, of
    keys [..., heads, tokens, width] that are centred, else None. size: values that share a step. step_dtype: what steps are
    stored in.
    """

    act_levels: Tensor
    act_zero: Tensor
    act_clip: Tensor
    act_centre: Tensor | None

    def __init__(self, tables: Tables, size: int, step_dtype: torch.dtype = torch.float32, centre: Tensor | None = None):
        super().__init__()
        self.size = size
        self.step_dtype = step_dtype
        self.enabled = True
        self.register_buffer("act_levels", tables.levels)
        self.register_buffer("act_zero", tables.levels.new_empty(0) if tables.zero is None else tables.zero)
        self.register_buffer("act_clip", stored_clip(tables.clip))
        self.register_buffer("act_centre", centre)

    @property
    def tables(self) -> Tables:
        """What the quantizer knows before it sees data."""
        clip = self.act_clip.float() / CLIP_UNIT
        return Tables(self.act_levels, self.act_zero if self.act_zero.numel() else None, clip)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.act_levels.shape[1] - 1).bit_length()

    def quantized(self, x: Tensor) -> Quantized:
        """Groups [..., size] -> the values of their codes, float32, and what they were found with."""
        if torch.compiler.is_compiling():
            return reference(x, self.tables, self.step_dtype)
        return backend_of(x.device).quantized(x, self.tables, self.step_dtype)

    def values(self, x: Tensor) -> Tensor:
        """Groups [..., size] -> the values of their codes, float32."""
        return self.quantized(x).values

    def forward(self, x: Tensor) -> Tensor:
        # Linears that read one input call in turn; it is quantized once.
        if not self.enabled:
            return plain(x)
        return once(x, self, self.in_dtype) if self.act_centre is None else self.in_dtype(self.centred(plain(x)))

    @property
    def centre(self) -> Tensor | None:
        """What keys are centred by, float32 [heads, width]."""
        return None if self.act_centre is None else self.act_centre.float() / CLIP_UNIT

    def centred(self, keys: Tensor) -> Tensor:
        """Keys [..., heads, tokens, width] minus the centre of their head, rounded to their dtype."""
        centre = self.centre
        return keys if centre is None else (keys.float() - centre.unsqueeze(-2)).to(keys.dtype)

    def in_dtype(self, x: Tensor) -> Tensor:
        """Values that the codes stand for, in the input's dtype: [..., width] -> the same."""
        kernels = None if torch.compiler.is_compiling() else backend_of(x.device).kernels
        if kernels is not None:
            return kernels.fake_quantize(x, self.tables, self.size, self.step_dtype)
        return join_groups(self.values(split_groups(x, self.size)), x.shape[-1]).to(x.dtype)


def empty_quantizer(layout: ActivationFormat, name: str, width: int, heads: int = 0) -> ActQuantizer:
    """A quantizer of the right shapes for the input `name` with `width` channels, to be filled by a loader.

    heads: of keys, where `name` is theirs.
    """
    centre = torch.zeros(heads, width, dtype=torch.int32) if CENTRE in layout.tensors(name) else None
    dtype = KV_STEP if name in (KEYS, VALUES) else torch.float32
    return ActQuantizer(layout.empty(name), layout.size(name, width), dtype, centre)


def quantizer_widths(layer: nn.Module, units: Units) -> dict[str, int]:
    """Channels of each quantizer's input: of its linears, or per head."""
    attention: Any = layer.get_submodule("self_attn")
    first: list[Any] = [layer.get_submodule(unit[0]) for unit in units]
    found = {input_name(unit): int(linear.in_features) for unit, linear in zip(units, first, strict=True)}
    return found | {KEYS: int(attention.head_dim), VALUES: int(attention.head_dim)}


def empty_quantizers(layer: nn.Module, units: Units, layout: ActivationFormat) -> dict[str, ActQuantizer]:
    """Quantizers of a decoder layer by name in the block, to be filled by a loader."""
    attention: Any = layer.get_submodule("self_attn")
    heads = int(attention.config.num_key_value_heads)
    return {name: empty_quantizer(layout, name, width, heads) for name, width in quantizer_widths(layer, units).items()}


def read_quantizers(
    layer: nn.Module, units: Units, tensors: dict[str, Tensor], prefix: str, layout: ActivationFormat
) -> dict[str, ActQuantizer]:
    """Quantizers of a decoder layer from its checkpoint's tensors, by name in the block. prefix: of the block's tensors."""
    found = empty_quantizers(layer, units, layout)
    for name, quantizer in found.items():
        stored = {part: tensors[f"{prefix}{name}.{part}"] for part in layout.tensors(name)}
        quantizer.load_state_dict(stored, assign=True)
    return found
