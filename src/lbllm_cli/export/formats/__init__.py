"""Formats of exports: every file in this folder is one, named as `export.format` names it, with `_` for a hyphen."""

from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor

from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.checkpoint import Checkpoint


class Exporter(Protocol):
    """The module of a format."""

    def check(self, model: SourceModel) -> None:
        """Raises UsageError naming what the model has that the format cannot hold."""

    def settings(self, model: SourceModel, checkpoint: Checkpoint) -> dict[str, Any]:
        """What config.json has beside the source's values."""

    def block(self, model: SourceModel, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a block as the folder has them. stored: as the checkpoint has them."""

    def named(self, model: SourceModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a block by the names that they have in the folder."""

    def weight_bytes(self, model: SourceModel, group_size: int) -> float:
        """Bytes of all binarized weights."""

    def quantizes(self) -> bool:
        """Whether a model that is loaded from the folder quantizes activations, where its stage does."""

    def fidelity(self, model: SourceModel) -> str:
        """How a loaded model's weights compare with the checkpoint's, for the log."""

    def loading(self) -> list[str]:
        """Lines of the model card: how to load the folder."""


def exporter(name: str) -> Exporter:
    """A format by its name, which the recipe has checked."""
    return cast(Exporter, import_module(f"{__name__}.{name.replace('-', '_')}"))
