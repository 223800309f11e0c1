"""Models of real shapes with random values, made where they run: there is nothing to load and nothing to keep."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lbllm_cli.format.activations import ActivationFormat, stored_clip
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.format.names import TENSORS
from lbllm_cli.format.settings import quantization_config
from lbllm_cli.hf import LbllmConfig, LbllmQuantizer
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.training.knees import Shape, tables_of

SHAPES: dict[str, dict[str, int]] = {
    "llama2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
        "num_hidden_layers": 32, "vocab_size": 32000,
    },
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 32, "vocab_size": 128256,
    },
    "70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
        "num_hidden_layers": 80, "vocab_size": 32000,
    },
}  # fmt: skip
GROUP = 128
LINEARS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
# 4 bits, two tables, as a search finds them.
KNEES = [Shape(3, 4, 4, 4, 5, 6), Shape(5, 6, 2, 2, 3, 3)]
FORMAT = ActivationFormat(4, 4, "group", "knee", "knee", 2, GROUP)


def config_of(name: str, **changes: int) -> LlamaConfig:
    """Configuration of a shape by name. changes: for example num_hidden_layers."""
    return LlamaConfig(**{**SHAPES[name], **changes}, max_position_embeddings=4096, dtype="bfloat16", tie_word_embeddings=False)


def dense_model(config: LlamaConfig, device: torch.device) -> Any:
    """transformers' own model in bfloat16."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def packed_model(config: LlamaConfig, device: torch.device, quantized: bool = True) -> Any:
    """The same as an export would be loaded. quantized: activations, keys and values in 4 bits."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    settings = quantization_config(GroupSizes(GROUP), 8, "act-calib", LINEARS, FORMAT if quantized else None)
    settings.pop("quant_method")
    quantizer = LbllmQuantizer(LbllmConfig(**settings))
    quantizer._process_model_before_weight_loading(model)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for module in model.modules():
        fill(module, device)
    return quantizer._process_model_after_weight_loading(model.eval().requires_grad_(False))


def fill(module: nn.Module, device: torch.device) -> None:
    """Random values for a module of a packed model, on a device."""
    with torch.no_grad():
        if isinstance(module, PackedLinear):
            module.weight.random_(0, 256)
            module.levels.copy_(torch.tensor([-40, 40, -127, 127], dtype=torch.int8))
            module.scale.fill_(2e-4)
        elif isinstance(module, ActQuantizer):
            tables = tables_of(KNEES)
            assert tables.zero is not None
            for name, tensor in zip(TENSORS, (tables.levels, tables.zero, stored_clip(tables.clip)), strict=True):
                module.register_buffer(name, tensor.to(device))
        else:
            for parameter in module.parameters(recurse=False):
                parameter.normal_(1.0 if "Norm" in type(module).__name__ else 0.0, 0.02)
