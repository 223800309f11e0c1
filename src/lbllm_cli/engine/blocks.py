"""Decoder blocks of a packed export as the library reads them."""

from ctypes import pointer
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbllm_cli.engine import abi
from lbllm_cli.engine.config import UNITS, Configuration, Unfit
from lbllm_cli.engine.memory import aligned
from lbllm_cli.engine.tensors import Tensors
from lbllm_cli.format.names import (
    CENTRE,
    CLIP_RANGE,
    CLIP_UNIT,
    KEYS,
    LEVEL_BITS,
    TABLE_LEVELS,
    TENSORS,
    VALUES,
    input_name,
    step_size,
)

_NORMS = "input_layernorm", "post_attention_layernorm"
_HEAD_NORMS = "self_attn.q_norm", "self_attn.k_norm"


class Blocks:
    """All blocks, repacked once, and the memory that they lie in."""

    def __init__(self, lib: Any, config: Configuration, tensors: Tensors, threads: int):
        self.lib, self.config, self.tensors, self.threads = lib, config, tensors, threads
        self.kept: list[Any] = []  # what the structures point to
        heads, shared, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.outs = {
            "self_attn.q_proj": heads * width, "self_attn.k_proj": shared * width, "self_attn.v_proj": shared * width,
            "self_attn.o_proj": config.hidden_size, "mlp.gate_proj": config.intermediate_size,
            "mlp.up_proj": config.intermediate_size, "mlp.down_proj": config.hidden_size,
        }  # fmt: skip
        self.widths = (config.hidden_size, heads * width, config.hidden_size, config.intermediate_size)
        self.record_bytes = [abi.record_bytes(width, self._size(name, width)) for name in (KEYS, VALUES)]
        self.structs = (abi.Block * config.num_hidden_layers)(*(self._block(index) for index in range(config.num_hidden_layers)))

    def _size(self, name: str, width: int) -> int:
        return step_size(name, width, self.config.activations["granularity"], self.config.step_group)

    def _block(self, index: int) -> abi.Block:
        config, prefix = self.config, f"model.layers.{index}."
        weights = [self._unit(index, unit, width) for unit, width in zip(UNITS, self.widths, strict=True)]
        names = [*(input_name(unit) for unit in UNITS), KEYS, VALUES]
        widths = (*self.widths, config.head_dim, config.head_dim)
        quantizers = [self._quantizer(prefix, name, width) for name, width in zip(names, widths, strict=True)]
        norms: list[int | None] = [self._norm(f"{prefix}{name}.weight", config.hidden_size) for name in _NORMS]
        of_heads = config.model_type == "qwen3"
        norms += [self._norm(f"{prefix}{name}.weight", config.head_dim) if of_heads else None for name in _HEAD_NORMS]
        return abi.Block(
            *weights, *quantizers, *norms, self._centre(prefix), epsilon=config.rms_norm_eps, scaling=config.head_dim**-0.5,
            hidden=config.hidden_size, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim, intermediate=config.intermediate_size, norm_dtype=abi.FLOAT32,
        )  # fmt: skip

    def _keep(self, array: NDArray[Any]) -> int:
        self.kept.append(array)
        return int(array.ctypes.data)

    def _norm(self, name: str, width: int) -> int:
        return self._keep(self.tensors.small_floats(name, width))

    def _unit(self, index: int, unit: tuple[str, ...], width: int) -> abi.Weights:
        """Linears of a block that read one input, below each other in the library's layout."""
        size, layout = self.config.level_groups.of_unit(index, unit), self.config.layout_sizes(index, unit)
        groups = ceil(width / size)
        parts: list[tuple[NDArray[Any], ...]] = []
        biases: list[NDArray[np.float32]] = []
        for linear in unit:
            owner, out = f"model.layers.{index}.{linear}", self.outs[linear]
            codes = self.tensors.array(f"{owner}.weight", "U8", out, groups, size // 4)
            scale = self.tensors.array(f"{owner}.scale", "F16", out, 1 if layout[1] else groups)
            # Also what is not negative: a sign bit is none of a scale's.
            if (scale.view(np.uint16) >= 0x7C00).any():
                raise Unfit(f"{owner}.scale holds what is no scale")
            parts.append((codes, self._levels(owner, out, groups), np.broadcast_to(scale, (out, groups))))
            biased = linear in self.config.biased
            biases.append(self.tensors.small_floats(f"{owner}.bias", out) if biased else np.zeros(out, np.float32))
        whole = [np.ascontiguousarray(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)]
        shape = (width, len(whole[0]), *layout)
        tiles = aligned(int(self.lib.lbllm_tiles_bytes(*shape)))
        self.lib.lbllm_pack(*(array.ctypes.data for array in whole), *shape, tiles.ctypes.data, self.threads)
        bias = self._keep(np.concatenate(biases)) if self.config.biased.intersection(unit) else None
        return abi.Weights(self._keep(tiles), bias, *shape)

    def _levels(self, owner: str, out: int, groups: int) -> NDArray[np.int8]:
        """int8 [out, groups, 4], however many bits the file has of each."""
        if self.config.level_bits == 8:
            return self.tensors.array(f"{owner}.levels", "I8", out, groups, 4)
        if self.config.level_bits == LEVEL_BITS[2]:
            return np.array(TABLE_LEVELS, np.int8)[self.tensors.array(f"{owner}.levels", "U8", out, groups, 1)[..., 0]]
        pairs = self.tensors.array(f"{owner}.levels", "U8", out, groups, 2)
        nibbles = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(out, groups, 4).astype(np.int8)
        return (nibbles ^ 8) - 8

    def _quantizer(self, prefix: str, name: str, width: int) -> Any:
        """What the library quantizes by, and a reference to it. Raises Unfit for tables that have no meaning, or are too wide."""
        layout, cached = self.config.activations, name in (KEYS, VALUES)
        knee = layout["kv_form" if cached else "form"] == "knee"
        count, owner = layout["tables"] if knee else 1, f"{prefix}{name}"
        stored = zip(TENSORS, ("U8", "U8", "I32"), ((count, 16), (count if knee else 0,), (count, 2)), strict=True)
        levels, zeros, clips = (self.tensors.array(f"{owner}.{part}", dtype, *shape).tolist() for part, dtype, shape in stored)
        least, most = (round(factor * CLIP_UNIT) for factor in CLIP_RANGE)
        good = all(sorted(set(row)) == row for row in levels) and all(least <= clip <= most for row in clips for clip in row)
        if not good or any(zero not in row for zero, row in zip(zeros, levels, strict=knee)):
            raise Unfit(f"{owner}: tables without meaning")
        tables = [
            abi.Table(row, zeros[at] if knee else None, (clips[at][0] / CLIP_UNIT, clips[at][1] / CLIP_UNIT))
            for at, row in enumerate(levels)
        ]
        size = self._size(name, width)
        if not abi.fits(tables, cached) or (cached and size % 2):
            raise Unfit(f"{owner}: a table that the library does not have")
        found = pointer(abi.quantizer(tables, size))
        self.kept.append(found)
        return found

    def _centre(self, prefix: str) -> int | None:
        """Where the vectors lie that keys go without, float32 [kv_heads, head_dim]."""
        if not self.config.activations.get("key_centre"):
            return None
        shape = self.config.num_key_value_heads, self.config.head_dim
        stored = self.tensors.array(f"{prefix}{KEYS}.{CENTRE}", "I32", *shape)
        return self._keep((stored / np.float32(CLIP_UNIT)).astype(np.float32))

