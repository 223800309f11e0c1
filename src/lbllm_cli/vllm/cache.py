"""vLLM's paged cache with keys and values as codes: the records of `format.kv_record`, a key's and a value's beside each other.

A page of SmolLM2-135M is 70 bytes a token and head instead of 256 in 16 bits. Attention is torch's over what is decoded of one
sequence at a time, so it is for memory, not for speed.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, MultipleOf

from lbllm_cli.runtime.kv_cache import read_record, record_bytes, write_record

# Queries that are looked at together: what hides tokens from them takes a byte for each pair, which vLLM does not know of when it
# divides memory. 8,192 new tokens behind 131,072 would take a gigabyte.
_ROWS = 256


@dataclass
class RecordMetadata:
    """A step's sequences. starts: int, one more than sequences, where each one's new tokens begin. lengths: tokens of each, new
    ones included. blocks: int32 [sequences, pages].
    """

    starts: list[int]
    lengths: list[int]
    blocks: Tensor


class RecordMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """What `RecordAttention` needs of a step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> RecordMetadata:
        """Once a step, for all layers."""
        found = common_attn_metadata
        return RecordMetadata(found.query_start_loc_cpu.tolist(), found.seq_lens.tolist(), found.block_table_tensor)


class _RecordBackend(AttentionBackend):  # type: ignore[misc]
    """Pages of records. content: bytes of a token's key and value of one head."""

    forward_includes_kv_cache_update = False
    content: int

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["RecordAttention"]:
        return RecordAttention

    @staticmethod
    def get_builder_cls() -> type[RecordMetadataBuilder]:
        return RecordMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return replace(spec, dtype=torch.uint8, state_content_bytes=cls.content)


@cache
def record_backend(content: int) -> type[_RecordBackend]:
    """The backend for layers whose tokens take this many bytes of a head."""
    return type(f"RecordBackend{content}", (_RecordBackend,), {"content": content})


class RecordAttention(AttentionImpl):  # type: ignore[misc]
    """Attention over records. layer: vLLM's, with quantizers `key_cache` and `value_cache`. by: the attention that it stands for.

    Raises ValueError naming what it has not.
    """

    def __init__(self, layer: Any, by: Any):
        for name, found in (("attention sinks", layer.has_sink), ("ALiBi", getattr(by, "alibi_slopes", None) is not None)):
            if found:
                raise ValueError(f"{layer.layer_name}: records have no {name}; take lbllm_cache values in --additional-config")
        self.num_heads, self.head_size, self.num_kv_heads = layer.num_heads, layer.head_size, layer.num_kv_heads
        self.scale = float(by.scale)
        self.window: int | None = layer.sliding_window
        self.soft_cap = float(getattr(by, "logits_soft_cap", None) or 0)
        self.keys_by, self.values_by = layer.key_cache, layer.value_cache

    @property
    def _sizes(self) -> list[int]:
        return [ceil(self.head_size / by.size) * record_bytes(by) for by in (self.keys_by, self.values_by)]

    @property
    def content(self) -> int:
        """Bytes of a token's key and value of one head."""
        return sum(self._sizes)

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Writes records. key, value: [tokens, heads, head_dim]. kv_cache: uint8 [pages, heads, tokens, content]."""
        count, page = len(slot_mapping), kv_cache.shape[2]
        pairs = ((key, self.keys_by), (value, self.values_by))
        records = torch.cat([write_record(by.centred(x[:count].unsqueeze(2)), by) for x, by in pairs], -1).squeeze(2)
        # Padding has no slot.
        own = slot_mapping >= 0
        slots = slot_mapping[own].long()
        kv_cache[slots // page, :, slots % page] = records[own]

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: RecordMetadata | None,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """query, output: [tokens, heads, head_dim]; keys and values are read from the cache."""
        if attn_metadata is None:  # vLLM tries itself out
            return output
        found = attn_metadata
        for row, (begin, end, length) in enumerate(zip(found.starts[:-1], found.starts[1:], found.lengths, strict=True)):
            if begin == end:
                continue
            # Where a window begins no earlier, earlier records are not decoded.
            page = kv_cache.shape[2]
            skipped = 0 if self.window is None else max(0, length - (end - begin) - self.window + 1) // page
            records = kv_cache[found.blocks[row, skipped : ceil(length / page)].long()].transpose(0, 1).flatten(1, 2)
            records = records[:, : length - skipped * page].unsqueeze(0)
            output[begin:end] = self._attend(query[begin:end], records).to(output.dtype)
        return output

    def _attend(self, query: Tensor, records: Tensor) -> Tensor:
        """query: [new, heads, head_dim], the last ones of `records`, uint8 [1, key heads, tokens, content] -> as query."""
        pieces = zip(records.split(self._sizes, -1), (self.keys_by, self.values_by), strict=True)
        keys, values = (read_record(piece, by, self.head_size).to(query.dtype) for piece, by in pieces)
        first = records.shape[2] - len(query)
        found = [self._rows(rows, first + at * _ROWS, keys, values) for at, rows in enumerate(query.split(_ROWS))]
        return torch.cat(found)

    def _rows(self, query: Tensor, first: int, keys: Tensor, values: Tensor) -> Tensor:
        """Of some of them, from place `first` on. keys, values: [1, key heads, tokens, head_dim]."""
        place = torch.arange(first, first + len(query), device=query.device).unsqueeze(1)
        held = torch.arange(keys.shape[2], device=query.device)
        seen = held <= place
        if self.window is not None:
            seen &= held > place - self.window
        rows = query.transpose(0, 1).unsqueeze(0)
        if not self.soft_cap:
            found = scaled_dot_product_attention(rows, keys, values, seen, scale=self.scale, enable_gqa=True)
            return found[0].transpose(0, 1)
        share = self.num_heads // self.num_kv_heads
        scores = rows.float() @ keys.repeat_interleave(share, 1).float().mT * self.scale
        scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ values.repeat_interleave(share, 1).float())[0].transpose(0, 1)
