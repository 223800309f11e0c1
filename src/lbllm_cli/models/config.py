"""config.json as transformers understands it, and whether the stored tensors are those that it names.

What cannot be computed with is refused by name, before a weight is read.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from lbllm_cli.core.errors import UsageError, reason
from lbllm_cli.core.model_folder import code_hint, read_config
from lbllm_cli.core.tensor_files import finite
from lbllm_cli.engine.rope import known_positions
from lbllm_cli.models.families import FAMILIES
from lbllm_cli.runtime.experts import separate_experts
from lbllm_cli.runtime.softcap import keep_soft_cap

# Far beyond any model: a model of 10^9 layers would be built for hours before its first tensor is missed.
_LAYERS, _WIDTH, _HEADS = 1024, 1 << 21, 1 << 14
_LIMITS = {
    "vocab_size": 1 << 24, "max_position_embeddings": 1 << 31, "hidden_size": _WIDTH, "intermediate_size": _WIDTH,
    "num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS, "num_key_value_heads": _HEADS, "head_dim": _HEADS,
}  # fmt: skip
# The same in families that only `lbllm generate` runs.
_OTHER_NAMES = {
    "n_layer": _LAYERS, "n_layers": _LAYERS, "num_layers": _LAYERS, "encoder_layers": _LAYERS, "decoder_layers": _LAYERS,
    "num_decoder_layers": _LAYERS, "n_embd": _WIDTH, "d_model": _WIDTH, "d_ff": _WIDTH, "ffn_dim": _WIDTH, "n_head": _HEADS,
    "num_labels": 1 << 20, "num_experts": _HEADS, "num_local_experts": _HEADS, "n_routed_experts": _HEADS, "n_positions": 1 << 31,
}  # fmt: skip
# What a configuration has for each layer.
_PER_LAYER = ("layer_types", "no_rope_layers")
# Configurations are copied level by level, and Python's stack has an end.
_DEPTH = 32


@contextmanager
def understood(file: Path, hint: str = "") -> Iterator[None]:
    """Around what transformers does with a file of a model folder. Raises UsageError with the library's reason.

    hint: what else may be the matter.
    """
    try:
        yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: configuration classes divide, look up and import with what they are given
        raise UsageError(f"{file} cannot be used: {reason(error)}{hint}") from None


def read_configuration(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """Configuration of a model folder, of any family.

    trust_remote_code: whether code that the folder brings may run; transformers would ask on the terminal. Raises UsageError for
    a config.json that transformers does not understand, and for sizes that no model has.
    """
    file, values = folder / "config.json", read_config(folder)
    _check_sizes(file, values)
    kind = values.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise UsageError(f"{file}: model_type: expected the name of a family, got {str(kind)[:40]}")
    quantized = values.get("quantization_config")
    if quantized is not None and not isinstance(quantized, dict):
        raise UsageError(f"{file}: quantization_config: expected a mapping, got {type(quantized).__name__}")
    with understood(file, code_hint(values, trust_remote_code)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not isinstance(config.get_text_config(), PretrainedConfig):
            raise UsageError(f"{file}: the configuration of the model inside (text_config, decoder) is no mapping")
    # What a model returns, not what it computes: others' code reads the outputs by name.
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    keep_soft_cap(config)
    if kind in FAMILIES:
        if values.get("is_encoder_decoder"):
            raise UsageError(f"{file}: is_encoder_decoder: expected false, {kind} has no encoder")
        if values.get("per_layer_config"):
            raise UsageError(f"{file}: per_layer_config: blocks of different shapes are not supported")
        check_family(file, config)
    return config


def _check_sizes(file: Path, values: dict[str, Any]) -> None:
    """Raises UsageError for a size beyond any model's, and in a supported family for one that is no positive integer."""
    strict = values.get("model_type") in list(FAMILIES)
    level: list[Any] = [values]
    for _ in range(_DEPTH):
        for key, value in (item for mapping in level if isinstance(mapping, dict) for item in mapping.items()):
            limit = _LIMITS.get(key, _OTHER_NAMES.get(key))
            if limit is not None and type(value) is int and value > limit:
                raise UsageError(f"{file}: {key}: expected at most {limit:,}, got {f'{value:,}'[:40]}")
            if strict and key in _LIMITS and value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{file}: {key}: expected a positive integer, got {str(value)[:40]}")
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, dict | list)]
    if level:
        raise UsageError(f"{file} is nested more than {_DEPTH} levels deep; expected a model's configuration")


def check_family(file: Path, config: Any) -> None:
    """What transformers' configuration classes leave unchecked, and kernels and blocks compute with. Raises UsageError."""
    heads, shared, window = config.num_attention_heads, config.num_key_value_heads, getattr(config, "sliding_window", None)
    width, eps = getattr(config, "head_dim", None) or config.hidden_size // heads, config.rms_norm_eps
    if heads % shared:
        raise UsageError(f"{file}: num_attention_heads {heads} is not a multiple of num_key_value_heads {shared}")
    if width % 2:
        raise UsageError(f"{file}: head_dim: expected an even number, got {width}")
    if window is not None and (type(window) is not int or window < 1):
        raise UsageError(f"{file}: sliding_window: expected a positive integer or null, got {str(window)[:40]}")
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise UsageError(f"{file}: mlp_only_layers, decoder_sparse_step: blocks of different shapes are not supported")
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention", "sliding_attention"} or ("sliding_attention" in kinds and window is None):
        raise UsageError(f"{file}: layer_types: expected full_attention, or sliding_attention with a sliding_window")
    if not math.isfinite(eps) or eps < 0:
        raise UsageError(f"{file}: rms_norm_eps: expected a number from 0, got {eps}")
    with understood(file):
        with torch.device("meta"):
            model = one_block(config, 0)
        # With values this time: a base of rotary embeddings below 0 gives NaN at every position.
        turns = [turn for angles in _angles(model, config, width) for turn in angles]
    # Half of a head is rotated in some families, and some give one angle for both halves.
    if any(part.shape[-1] > width or not finite(part) for part in turns):
        raise UsageError(f"{file}: rope_parameters give rotary embeddings that are not finite or wider than head_dim {width}")


def _angles(model: Any, config: PretrainedConfig, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """cos and sin of two positions, of each kind of layer that has a base of its own."""
    rotary = type(model.rotary_emb)(config)
    given = (torch.zeros(1, 2, width), torch.arange(2).unsqueeze(0))
    if "layer_type" in signature(rotary.forward).parameters:
        for kind in sorted(set(getattr(config, "layer_types", []))):
            yield rotary(*given, kind)
    else:
        yield rotary(*given)


def one_block(config: PretrainedConfig, index: int) -> Any:
    """The model with only block `index`: masks, rotary embedding and layer type are then transformers' own."""
    model = AutoModel.from_config(_with_one_block(config, index))
    separate_experts(layers(model)[0])
    return model


def module_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model by its name here, where each expert's linears are modules; blocks are all alike."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(_with_one_block(config, 0))
    separate_experts(layers(model.model)[0])
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        inside = name.removeprefix("model.layers.0.")
        for index in range(config.num_hidden_layers if inside != name else 1):
            found[f"model.layers.{index}.{inside}" if inside != name else name] = tuple(tensor.shape)
    return found


def _with_one_block(config: PretrainedConfig, index: int) -> PretrainedConfig:
    single = copy.deepcopy(config)
    single.num_hidden_layers = 1
    for name in _PER_LAYER:
        if values := getattr(config, name, None):
            setattr(single, name, [values[index]])
    return single


def layers(model: Any) -> nn.ModuleList:
    """Decoder layers of a model without head."""
    found: nn.ModuleList = model.layers
    return found


def positions(config: PretrainedConfig) -> int | None:
    """How many positions a model knows; None where it has no limit. Rotary embeddings that are stretched know more."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if type(limit) is not int or limit < 1:
        return None
    return known_positions(limit, getattr(text, "rope_parameters", None) or {})
