"""2-bit codes, levels and scales as they are stored: a folder that transformers loads through `lbllm_cli.hf`."""

from typing import Any

from torch import Tensor

from lbllm_cli.core.errors import RunError
from lbllm_cli.export.base import FolderExporter, Form, snippet
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.format.names import ROW_SCALE
from lbllm_cli.format.rows import quantize_rows
from lbllm_cli.format.settings import quantization_config
from lbllm_cli.models.model import EMBEDDING, HEAD, SourceModel
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.forecast import checkpoint_bytes


class Packed(FolderExporter):
    """Codes, levels, scales and quantizers."""

    quantizes = True

    def settings(self, model: SourceModel, checkpoint: Checkpoint, form: Form) -> dict[str, Any]:
        """How to read the folder."""
        stage, activations = checkpoint.stage, checkpoint.activations
        found = quantization_config(*checkpoint.record.weights, stage, model.linears, activations, form.head_bits)
        return {"quantization_config": found}

    def outer(self, tensors: dict[str, Tensor], form: Form) -> dict[str, Tensor]:
        """Embedding and head in 8 bits, where they are asked for."""
        if form.head_bits == 16:
            return tensors
        found = dict(tensors)
        for name in (EMBEDDING, HEAD):
            if name in tensors:
                try:
                    found[name], found[f"{name.removesuffix('.weight')}.{ROW_SCALE}"] = quantize_rows(tensors[name])
                except ValueError as error:
                    raise RunError(f"export.head_bits: 8: {name}: {error}; set it to 16") from None
        return found

    def block(self, model: SourceModel, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the checkpoint has them."""
        return stored

    def weight_bytes(self, model: SourceModel, sizes: GroupSizes, level_bits: int) -> float:
        """Those of the stage."""
        return checkpoint_bytes(model, sizes, level_bits)

    def fidelity(self, model: SourceModel, form: Form) -> str:
        """Tensors are the checkpoint's."""
        return "everything is exact" if form.head_bits == 16 else "everything is exact but for embedding and head, in 8 bits"

    def loading(self, place: str) -> list[str]:
        """With the plugin."""
        return [
            "In transformers it needs the plugin; without it loading fails on the shape of the weights. It comes with lbllm: "
            "`pip install .` in a checkout of that.",
            *snippet(
                "python",
                "import lbllm_cli.hf",
                "from transformers import AutoModelForCausalLM",
                "",
                f'model = AutoModelForCausalLM.from_pretrained("{place}")',
            ),
            "",
            "vLLM finds the plugin by itself where both are installed:",
            *snippet("sh", "pip install vllm .  # in a checkout of lbllm", f"vllm serve {place}"),
            "",
            "On the command line:",
            *snippet("sh", f'lbllm generate --model {place} --prompt "What is a comet?"'),
        ]


FORMAT = Packed()
