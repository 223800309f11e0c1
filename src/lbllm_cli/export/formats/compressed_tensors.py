"""`compressed-tensors` with 8-bit integers: a folder that transformers loads without lbllm.

A level is an int8 number times its group's scale, which is what `pack-quantized` weights of eight bits are: nothing is rounded.
"""

from math import gcd
from typing import Any

import torch
from torch import Tensor

from lbllm_cli.core.errors import UsageError
from lbllm_cli.export.base import FolderExporter, Form, snippet
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.format.levels import scale_group
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.models.block import block_prefix
from lbllm_cli.models.model import SourceModel
from lbllm_cli.models.stored import whole_tensors
from lbllm_cli.pipeline.checkpoint import Checkpoint

_BITS = 8
# Weights in an int32 word; it holds them as if each had 128 added, the first in its lowest byte.
_WORD = 4
_OFFSET = 1 << (_BITS - 1)


class CompressedTensors(FolderExporter):
    """Integers and scales."""

    def check(self, model: SourceModel, shared: int) -> None:
        """Raises UsageError for experts: transformers keeps them in one tensor, for which the format has no weights."""
        if model.experts is not None:
            raise UsageError(
                f"export.format: compressed-tensors has no form for experts ({model.config.model_type}); set it to packed or "
                "dense"
            )

    def settings(self, model: SourceModel, checkpoint: Checkpoint, form: Form) -> dict[str, Any]:
        """Scheme of every linear: a row whose last group is shorter has groups that divide it, several to one of ours."""
        groups: dict[int, list[str]] = {}
        for name in model.linears:
            width = model.shapes[f"{block_prefix(0)}{name}.weight"][1]
            groups.setdefault(gcd(width, checkpoint.record.scale_group), []).append(name)
        schemes = {f"group_{number}": _scheme(size, names) for number, (size, names) in enumerate(sorted(groups.items()))}
        found = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": schemes,
            "ignore": ["lm_head"],
        }
        return {"quantization_config": found}

    def block(self, model: SourceModel, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Integers four to a word, a float16 scale for each group, and the shape."""
        found = {name: tensor.to(model.source_dtype()) for name, tensor in whole_tensors(stored).items()}
        for owner in PackedWeight.owners(stored):
            width = model.shapes[f"{owner}.weight"][1]
            packed = PackedWeight.from_tensors(stored, owner, width)
            scale = packed.scales_of(gcd(width, scale_group(packed.group_size, packed.level_bits)))
            shape = torch.tensor([packed.scale.shape[0], width])
            parts = {"weight_packed": words(packed.whole_levels()), "weight_scale": scale, "weight_shape": shape}
            found |= {f"{owner}.{part}": tensor for part, tensor in parts.items()}
        return found

    def weight_bytes(self, model: SourceModel, sizes: GroupSizes, level_bits: int) -> float:
        """A byte a weight, in whole words; two for each scale; the shape."""
        shared = scale_group(sizes.size, level_bits)
        return model.blocks * sum(
            rows * (width + -width % _WORD + 2.0 * width / gcd(width, shared)) + 16 for rows, width in model.binarized_shapes
        )

    def fidelity(self, model: SourceModel, form: Form) -> str:
        """The file is exact."""
        return "weights are exact where they are loaded in float32; in 16 bits their reader rounds levels times scales"

    def loading(self, place: str) -> list[str]:
        """Without the plugin."""
        return [
            "Loading needs no code of lbllm, only the package compressed-tensors:",
            *snippet(
                "python",
                "from transformers import AutoModelForCausalLM  # pip install compressed-tensors",
                "",
                f'model = AutoModelForCausalLM.from_pretrained("{place}", dtype="float32")',
            ),
        ]


def _scheme(size: int, names: list[str]) -> dict[str, Any]:
    weights = {"num_bits": _BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": size, "dynamic": False}
    targets = [rf"re:.*layers\.\d+\.{name.replace('.', chr(92) + '.')}$" for name in names]
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def words(levels: Tensor) -> Tensor:
    """int8 [out, in] -> int32 [out, in / 4 rounded up]: (-128, -127, 0, 1) -> 0x81800100."""
    padded = torch.nn.functional.pad((levels.int() + _OFFSET).to(torch.uint8), (0, -levels.shape[1] % _WORD))
    return padded.view(torch.int32)


FORMAT = CompressedTensors()
