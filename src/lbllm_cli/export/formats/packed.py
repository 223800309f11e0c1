"""2-bit codes, levels and scales as they are stored: a folder that transformers loads through `lbllm_cli.hf`."""

from typing import Any

from torch import Tensor

from lbllm_cli.format.settings import quantization_config
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.forecast import checkpoint_bytes


def check(model: SourceModel) -> None:
    """It is made for every model that has a checkpoint."""


def settings(model: SourceModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """How to read the folder."""
    found = quantization_config(checkpoint.record.group_size, checkpoint.stage, model.linears, checkpoint.activations)
    return {"quantization_config": found}


def block(model: SourceModel, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the checkpoint has them."""
    return stored


def named(model: SourceModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As modules have them: each expert's linears by themselves."""
    return tensors


def weight_bytes(model: SourceModel, group_size: int) -> float:
    """Those of the stage."""
    return checkpoint_bytes(model, group_size)


def quantizes() -> bool:
    """The plugin does."""
    return True


def fidelity(model: SourceModel) -> str:
    """Tensors are the checkpoint's."""
    return "everything is exact"


def loading() -> list[str]:
    """With the plugin."""
    return [
        "Loading needs the plugin; without it transformers fails on the shape of the weights.",
        "",
        "```python",
        "import lbllm_cli.hf  # pip install lbllm-cli",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER")',
        "```",
    ]
