"""Decoded weights in the source's dtype: an ordinary folder, which anything loads."""

from typing import Any

from torch import Tensor

from lbllm_cli.export.base import FolderExporter, Form
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.models.model import SourceModel
from lbllm_cli.models.stored import decoded
from lbllm_cli.pipeline.checkpoint import Checkpoint


class Dense(FolderExporter):
    """One tensor a weight."""

    def settings(self, model: SourceModel, checkpoint: Checkpoint, form: Form) -> dict[str, Any]:
        """Nothing beside the source's values."""
        return {}

    def block(self, model: SourceModel, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """In the source dtype: in bfloat16 a level loses up to 2^-9 of its value."""
        return {name: tensor.to(model.source_dtype()) for name, tensor in decoded(stored, model).items()}

    def named(self, model: SourceModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the source's files have them."""
        return model.as_stored(tensors)

    def weight_bytes(self, model: SourceModel, sizes: GroupSizes, level_bits: int) -> float:
        """Two bytes a weight."""
        return model.binarized_parameters * 2.0

    def fidelity(self, model: SourceModel, form: Form) -> str:
        """In the source's dtype."""
        dtype = str(model.source_dtype()).removeprefix("torch.")
        return "weights are exact in float32" if dtype == "float32" else f"weights are rounded to {dtype}"

    def loading(self, place: str) -> list[str]:
        """As the source."""
        return ["This folder holds the decoded weights: any program that reads the source model reads it."]


FORMAT = Dense()
