"""Families of models that llama.cpp has as well, by its names, and what it takes for granted in each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lbllm_cli.models.model import SourceModel

# Gemma 3, in llama.cpp: every sixth layer is full, the others have this base.
_GEMMA3_PATTERN, _GEMMA3_SLIDING_BASE = 6, 10000.0


@dataclass(frozen=True)
class Architecture:
    """name: of the file's keys. neighbours: whether rotary embedding turns neighbouring rows of q and k, and not rows of two
    halves. odd: what a configuration has that it does not know, one line each.
    """

    name: str
    neighbours: bool = False
    odd: Callable[[Any], list[str]] = lambda config: []


def _sliding(config: Any) -> list[str]:
    kinds = set(getattr(config, "layer_types", None) or ())
    used = "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))
    return ["layers with a sliding window"] if used else []


def _activated(config: Any, key: str, known: str) -> list[str]:
    found = getattr(config, key)
    return [] if found == known else [f"{key} {found}"]


def _silu(config: Any) -> list[str]:
    return _sliding(config) + _activated(config, "hidden_act", "silu")


def _biased(config: Any) -> list[str]:
    return _silu(config) + (["biases of linears"] if config.attention_bias or getattr(config, "mlp_bias", False) else [])


def _gemma3(config: Any) -> list[str]:
    layers = range(config.num_hidden_layers)
    kinds = ["full_attention" if (i + 1) % _GEMMA3_PATTERN == 0 else "sliding_attention" for i in layers]
    found = [] if list(config.layer_types) == kinds else [f"layer_types other than one full layer in {_GEMMA3_PATTERN}"]
    if config.rope_parameters["sliding_attention"]["rope_theta"] != _GEMMA3_SLIDING_BASE:
        found.append(f"a sliding rope_theta other than {_GEMMA3_SLIDING_BASE:.0f}")
    if config.query_pre_attn_scalar != config.head_dim:
        found.append("query_pre_attn_scalar other than head_dim")
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        found.append("soft caps")
    return found + _activated(config, "hidden_activation", "gelu_pytorch_tanh")


ARCHITECTURES = {
    "llama": Architecture("llama", neighbours=True, odd=_biased),
    "qwen2": Architecture("qwen2", odd=_silu),
    "qwen3": Architecture("qwen3", odd=_biased),
    "gemma3_text": Architecture("gemma3", odd=_gemma3),
}


def full_rope(config: Any) -> dict[str, Any]:
    """Rotary settings of layers that see everything."""
    found: dict[str, Any] = config.rope_parameters
    return found.get("full_attention", found)


def odd_rope(config: Any) -> list[str]:
    """Rotary settings that cannot be written, one line each."""
    kind = full_rope(config)["rope_type"]
    known = ("default", "linear") if config.model_type == "gemma3_text" else ("default", "linear", "llama3")
    return [] if kind in known else [f"rope_type {kind}"]


def rope_factors(config: Any) -> Tensor | None:
    """What each frequency is divided by, float32 [head_dim / 2]; None where all are as usual, or divided by one number."""
    rope = full_rope(config)
    if rope["rope_type"] != "llama3":
        return None
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(frequencies)
    usual = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return usual / frequencies


def turned_rows(rows: int, heads: int) -> Tensor:
    """Rows of q or k in the order in which neighbours belong together: int64 [rows].

    8 rows, 2 heads -> 0, 2, 1, 3, 4, 6, 5, 7.
    """
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()


def write_settings(writer: Any, model: SourceModel) -> None:
    """Sizes, norms and rotary embedding, under the architecture's keys. writer: `gguf.GGUFWriter`."""
    config, rope = model.config, full_rope(model.config)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
