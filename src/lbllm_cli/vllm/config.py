"""What vLLM asks of a packed model before it has weights: which of its layers are packed, and under which names tensors come."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from lbllm_cli.format.activations import format_of
from lbllm_cli.format.settings import DENSE_ROWS, METHOD, check_settings, group_sizes

_IN_BLOCK = re.compile(r"\.layers\.(\d+)\.(.+)$")
# In --additional-config, the first is what counts without it.
_CHOICES = {"lbllm_activations": ("stored", "full"), "lbllm_cache": ("values", "codes")}
_MIXTRAL = {
    r"\.mlp\.(gate|experts)\.": r".block_sparse_moe.\1.",
    r"(\.experts\.\d+)\.gate_proj\.": r"\1.w1.",
    r"(\.experts\.\d+)\.down_proj\.": r"\1.w2.",
    r"(\.experts\.\d+)\.up_proj\.": r"\1.w3.",
}


@register_quantization_config(METHOD)
class LbllmConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization_config` of a packed model, for vLLM. settings: as config.json has it.

    Raises ValueError for a format_version or a value that this lbllm does not read. vLLM sends it to other processes:
    everything that is imported with weights is imported by its methods.
    """

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        check_settings(settings)
        self.settings = settings
        self.sizes = group_sizes(settings)
        self.level_bits: int = settings.get("level_bits", 8)
        self.head_bits: int = settings.get("head_bits", 16)
        self.linears: list[str] = settings["linears"]
        self.layout = format_of(settings)
        self.model_type = ""
        self._choice: dict[str, str] = {}

    def get_name(self) -> str:
        """As config.json has it."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that kernels compute in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Older GPUs than the kernels are for run it in torch."""
        return 60

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LbllmConfig":
        """From config.json."""
        return cls(config)

    def get_cache_scale_mapper(self) -> WeightsMapper:
        """Where the export has other names than vLLM.

        Quantizers of keys and values belong to vLLM's attention, which lies one module deeper than the export's; those of experts
        would be taken for linears (`experts`); and Mixtral's blocks have the names of its first release.
        """
        names = {
            r"\.self_attn\.(key|value)_cache\.": r".self_attn.attn.\1_cache.",
            r"\.experts\.(gate|down)_proj_input\.": r".experts.\1_input.",
            **(_MIXTRAL if self.model_type == "mixtral" else {}),
        }
        return WeightsMapper(orig_to_new_regex={re.compile(own): theirs for own, theirs in names.items()})

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Looks whether a folder holds what its configuration says, before anything is loaded.

        vLLM does not miss a tensor of a quantized model, and would run with whatever lies in its place. Raises ValueError naming
        the first that is wrong.
        """
        from lbllm_cli.hf import check_packed

        self.model_type = hf_config.model_type
        if self.head_bits != 16 and self.model_type in DENSE_ROWS:
            raise ValueError(
                f"vLLM's {self.model_type} has an embedding of 16 bits alone, the export has head_bits {self.head_bits}; "
                "export it again with export.head_bits=16"
            )
        if os.path.isdir(model_name):
            check_packed(hf_config, sorted(Path(model_name).glob("model*.safetensors")))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Packed linears and attention with quantized keys and values; everything else as it is."""
        from lbllm_cli.vllm.attention import QuantizedKeysValues
        from lbllm_cli.vllm.experts import PackedExpertsMethod
        from lbllm_cli.vllm.linear import PackedLinearMethod
        from lbllm_cli.vllm.rows import PackedRowsMethod

        if isinstance(layer, LinearBase):
            names = self._stored_names(prefix)
            return PackedLinearMethod(self, prefix, names, self._active_layout()) if names else UnquantizedLinearMethod()
        if isinstance(layer, Attention) and self.layout is not None:
            form = self._wanted()["lbllm_cache"] if self._active_layout() else "full"
            return QuantizedKeysValues(self, prefix, self.layout, form)
        if isinstance(layer, VocabParallelEmbedding) and self.head_bits != 16:
            return PackedRowsMethod(prefix)
        if isinstance(layer, RoutedExperts) and any(".experts." in name for name in self.linears):
            return PackedExpertsMethod(self, prefix, layer.moe_config, self.layout, self._active_layout() is not None)
        return None

    def _wanted(self) -> dict[str, str]:
        """What `--additional-config` asks for. Raises ValueError for what it, or vLLM, cannot be asked for here."""
        # vLLM asks for methods once more after loading, where there is no configuration to be had.
        if not self._choice:
            if get_current_vllm_config().lora_config is not None:
                raise ValueError("--enable-lora: packed linears take no LoRA; leave it out, or serve an export of another format")
            given = get_current_vllm_config().additional_config or {}
            if unknown := [key for key in given if key.startswith("lbllm") and key not in _CHOICES]:
                raise ValueError(f"--additional-config {', '.join(unknown)}: expected {' or '.join(_CHOICES)}")
            for key, choices in _CHOICES.items():
                self._choice[key] = given.get(key, choices[0])
                if self._choice[key] not in choices:
                    raise ValueError(f"--additional-config {key}: expected {' or '.join(choices)}, got {self._choice[key]!r}")
            quantized = self.layout is not None and self._choice["lbllm_activations"] == "stored"
            if self._choice["lbllm_cache"] == "codes" and not quantized:
                why = "has none" if self.layout is None else "runs without them: lbllm_activations is full"
                raise ValueError(f"--additional-config lbllm_cache: codes are of quantized keys and values, the model {why}")
        return self._choice

    def _active_layout(self) -> Any:
        """How activations are quantized, None where they are not."""
        return self.layout if self._wanted()["lbllm_activations"] == "stored" else None

    def _stored_names(self, prefix: str) -> list[str]:
        """Packed linears of a block, by the names that the export has, that a linear of vLLM stands for; empty for none.

        "model.layers.3.self_attn.qkv_proj" -> ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].
        """
        found = _IN_BLOCK.search(prefix)
        if not found:
            return []
        if found[2] in self.linears:
            return [found[2]]
        owner, _, own = found[2].rpartition(".")
        names = [f"{owner}.{name}" for name in self.packed_modules_mapping.get(own, [own])]
        packed = [name for name in names if name in self.linears]
        if packed and packed != names:
            raise ValueError(f"{prefix}: vLLM joins {', '.join(names)}, of which the export has packed {', '.join(packed)} alone")
        return packed

    def group_size(self, prefix: str, names: list[str]) -> int:
        """Inputs that share four levels, of packed linears of the block of `prefix`. Raises ValueError where they differ."""
        found = _IN_BLOCK.search(prefix)
        assert found is not None
        return self.sizes.of_unit(int(found[1]), tuple(names))
