"""config.json of a packed export that the library runs as a whole."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lbllm_cli.core.model_folder import read_config
from lbllm_cli.core.validation import describe
from lbllm_cli.engine.abi import GROUP_MAX, HEAD_MAX
from lbllm_cli.engine.rope import KINDS
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.format.names import LEVEL_BITS
from lbllm_cli.format.settings import METHOD, check_settings, group_sizes

# Of a block, as the library runs them together: linears that read one input.
UNITS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)  # fmt: skip

_QKV, _OUT, _MLP = UNITS[0], UNITS[1], (*UNITS[2], *UNITS[3])
# Linears that have a bias, for each key of a family's configuration: transformers' modelling code of each.
_BIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {"attention_bias": _QKV + _OUT, "mlp_bias": _MLP},
    "qwen3": {"attention_bias": _QKV + _OUT},
    "seed_oss": {"attention_bias": _QKV, "attention_out_bias": _OUT, "mlp_bias": _MLP},
}

Size = Annotated[int, Field(ge=1, le=1 << 24)]


class Unfit(Exception):
    """Why a folder cannot run in the library alone: transformers reads it, or says what is wrong with it."""


class Configuration(BaseModel):
    """What the library computes of a configuration, and what must not be in it."""

    model_config = ConfigDict(strict=True, frozen=True)

    model_type: Literal["llama", "mistral", "qwen2", "qwen3", "seed_oss"]
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024)]
    num_attention_heads: Annotated[int, Field(ge=1, le=1 << 14)]
    num_key_value_heads: Annotated[int, Field(ge=1, le=1 << 14)]
    head_dim: Annotated[int, Field(ge=2, le=HEAD_MAX, multiple_of=2)]
    vocab_size: Size
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 30)]
    rms_norm_eps: Annotated[float, Field(ge=0, le=1)]
    hidden_act: Literal["silu"]
    tie_word_embeddings: bool
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    rope: dict[str, Any]
    quantization_config: dict[str, Any]
    eos_token_id: int | list[int] | None = None

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Values that a configuration may leave out, and the rotary embedding under either of its names."""
        found = {key: value for key, value in values.items() if value is not None}
        heads, width = found.get("num_attention_heads"), found.get("hidden_size")
        found.setdefault("num_key_value_heads", heads)
        if type(heads) is int and type(width) is int and heads:
            found.setdefault("head_dim", width // heads)
        if found.get("model_type") == "seed_oss":
            found.setdefault("attention_bias", True)
        # Where both are there, the older name counts, as in transformers: cards of models tell people to add it.
        rope = found.get("rope_scaling") or found.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"rope_parameters: expected a mapping, got {type(rope).__name__}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        found["rope"] = {"rope_theta": found.get("rope_theta", 10000.0), **rope, "rope_type": kind}
        return found

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        """Windows of attention, and other shapes of a family."""
        if not isinstance(values, dict):
            raise ValueError("expected a mapping")
        window, limit = values.get("sliding_window"), values.get("max_position_embeddings")
        slides = "sliding_attention" in (values.get("layer_types") or ())
        if values.get("model_type") == "mistral":
            slides = window is not None and not (type(window) is type(limit) is int and window >= limit)
        if slides or values.get("use_sliding_window"):
            raise ValueError("attention has a window")
        return values

    @model_validator(mode="after")
    def _known(self) -> "Configuration":
        rope, layout = self.rope, self.quantization_config.get("activations")
        if rope["rope_type"] not in KINDS or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"rope_type: expected {', '.join(KINDS)} of whole heads, got {rope['rope_type']}")
        if self.quantization_config.get("quant_method") != METHOD:
            raise ValueError(f"quant_method: expected {METHOD}")
        check_settings(self.quantization_config)
        if sorted(self.quantization_config["linears"]) != sorted(name for unit in UNITS for name in unit):
            raise ValueError("linears: not those of the families that the library knows")
        if layout is None or layout["bits"] != 4 or layout["kv_bits"] != 4:
            raise ValueError("activations, keys and values are not quantized to 4 bits")
        for block in range(self.num_hidden_layers):
            for unit in UNITS:
                self.level_groups.of_unit(block, unit)  # raises for linears that read one input in groups of two sizes
        if self.num_attention_heads % self.num_key_value_heads or self.step_group > GROUP_MAX:
            raise ValueError("heads or groups that the library does not have")
        return self

    @property
    def level_groups(self) -> GroupSizes:
        """Inputs that share four levels."""
        return group_sizes(self.quantization_config)

    @property
    def step_group(self) -> int:
        """Inputs that share a step."""
        return int(self.quantization_config["activations"]["group_size"])

    def layout_sizes(self, block: int, unit: tuple[str, ...]) -> tuple[int, int]:
        """Of the library's layout: inputs that share a step, and those that share levels, 0 where that is the same group."""
        return self.step_group, self.level_groups.of_unit(block, unit) if self.level_bits == LEVEL_BITS[2] else 0

    @property
    def level_bits(self) -> int:
        """Bits of a stored level."""
        return int(self.quantization_config.get("level_bits", 8))

    @property
    def head_bits(self) -> int:
        """Bits of embedding and head, 16 for as the source has them."""
        return int(self.quantization_config.get("head_bits", 16))

    @property
    def biased(self) -> frozenset[str]:
        """Linears of a block that have a bias."""
        keys = _BIASES.get(self.model_type, {})
        found = {name for key, names in keys.items() if getattr(self, key) for name in names}
        return frozenset(_QKV) if self.model_type == "qwen2" else frozenset(found)

    @property
    def activations(self) -> dict[str, Any]:
        """How activations, keys and values are quantized."""
        return dict(self.quantization_config["activations"])


def read_configuration(folder: Path) -> Configuration:
    """Of a packed export. Raises Unfit for what the library does not compute, UsageError for a config.json that is none."""
    values = read_config(folder)
    try:
        return Configuration.model_validate(values)
    except ValidationError as error:
        raise Unfit(f"config.json: {describe(error)}") from None
