#!/usr/bin/env python3
"""A packed export and a GGUF file of one shape with random values: what their speed is measured with where there is no model.

    python scripts/bench/random_export.py llama3.2-1b --out runs/llama3.2-1b

OUT/export: levels of 4 bits, groups of 64, embedding and head of 8 bits, activations, keys and values of 4. OUT/source.gguf:
Q8_0. Needs the package gguf. Neither has a tokenizer.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lbllm_cli.engine.config import UNITS
from lbllm_cli.format.activations import ActivationFormat, Tables, stored_clip
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.format.names import KEYS, TENSORS, VALUES, input_name
from lbllm_cli.format.settings import quantization_config
from lbllm_cli.training.knees import Shape, tables_of

SHAPES: dict[str, dict[str, Any]] = {
    "llama3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "num_hidden_layers": 16, "vocab_size": 128256, "rope_theta": 500000.0,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "num_hidden_layers": 30, "vocab_size": 49152, "rope_theta": 100000.0,
    },
}  # fmt: skip
GROUP = 64
# As a search finds them.
KNEES = [Shape(3, 4, 4, 4, 5, 6), Shape(5, 6, 2, 2, 3, 3)]
# Small enough for states that stay finite.
SPREAD = 2.0**-9


def linears_of(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of a block's linears by name."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    queries, shared = (shape[key] * shape["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    outs = {"q_proj": (queries, hidden), "k_proj": (shared, hidden), "v_proj": (shared, hidden), "o_proj": (hidden, queries)}
    found = {f"self_attn.{name}": sizes for name, sizes in outs.items()}
    return found | {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}


def packed_block(prefix: str, shape: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Tensors of a block."""
    found: dict[str, Tensor] = {}
    for name, (out, width) in linears_of(shape).items():
        groups = -(-width // GROUP)
        found[f"{prefix}{name}.weight"] = torch.randint(256, (out, groups, GROUP // 4), generator=generator).to(torch.uint8)
        # -7, -2, 2 and 7 as two's complement.
        found[f"{prefix}{name}.levels"] = torch.tensor([0x29, 0xE7], dtype=torch.uint8).expand(out, groups, 2).contiguous()
        found[f"{prefix}{name}.scale"] = torch.full((out, groups), SPREAD, dtype=torch.float16)
    tables: Tables = tables_of(KNEES)
    assert tables.zero is not None
    for name in (*map(input_name, UNITS), KEYS, VALUES):
        stored = (tables.levels, tables.zero, stored_clip(tables.clip))
        found |= {f"{prefix}{name}.{part}": tensor.clone() for part, tensor in zip(TENSORS, stored, strict=True)}
    for name in ("input_layernorm", "post_attention_layernorm"):
        found[f"{prefix}{name}.weight"] = torch.ones(shape["hidden_size"], dtype=torch.bfloat16)
    return found


def write_export(shape: dict[str, Any], folder: Path) -> None:
    """The packed folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, hidden = torch.Generator().manual_seed(1), shape["hidden_size"]
    tensors = {
        "model.embed_tokens.weight": torch.randint(-127, 128, (shape["vocab_size"], hidden), generator=generator).to(torch.int8),
        "model.embed_tokens.scale": torch.full((shape["vocab_size"],), SPREAD, dtype=torch.float16),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for index in range(shape["num_hidden_layers"]):
        tensors |= packed_block(f"model.layers.{index}.", shape, generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layout = ActivationFormat(4, 4, "group", "knee", "knee", len(KNEES), GROUP)
    settings = quantization_config(GroupSizes(GROUP), 4, "act-calib", tuple(linears_of(shape)), layout, 8)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "bfloat16", "quantization_config": settings, **shape,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def q8_rows(rows: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Blocks of Q8_0 with random integers: uint8 [rows, width / 32 * 34]."""
    blocks = np.empty((rows, width // 32, 34), np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(SPREAD / 16).tobytes(), np.uint8)
    blocks[..., 2:] = generator.integers(0, 256, (rows, width // 32, 32), np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(shape: dict[str, Any], file: Path) -> None:
    """The same shape in Q8_0."""
    writer, generator = gguf.GGUFWriter(file, "llama"), np.random.default_rng(1)
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(8192)
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape["num_hidden_layers"])

    def add(name: str, tensor: np.ndarray, kind: gguf.GGMLQuantizationType | None = None) -> None:
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor, raw_dtype=kind)

    hidden, q8 = shape["hidden_size"], gguf.GGMLQuantizationType.Q8_0
    add("model.embed_tokens.weight", q8_rows(shape["vocab_size"], hidden, generator), q8)
    add("model.norm.weight", np.ones(hidden, np.float32))
    for index in range(shape["num_hidden_layers"]):
        for name, (out, width) in linears_of(shape).items():
            add(f"model.layers.{index}.{name}.weight", q8_rows(out, width, generator), q8)
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"model.layers.{index}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Writes both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write_export(SHAPES[args.shape], args.out / "export")
    write_gguf(SHAPES[args.shape], args.out / "source.gguf")


if __name__ == "__main__":
    main()
