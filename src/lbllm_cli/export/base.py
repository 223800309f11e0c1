"""What a format of exports is asked for, and how those are written that are folders of safetensors."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lbllm_cli.core import files, interrupt, model_folder
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import USUAL_FORMAT


@dataclass(frozen=True)
class Form:
    """What an export is to be. format: of `export.formats`. shard_bytes: of its largest weight file, where there may be several.

    head_bits: of embedding and head in a packed export, 16 for as the source has them.
    """

    format: str
    shard_bytes: int
    head_bits: int = 16

    @classmethod
    def of(cls, recipe: Recipe) -> "Form":
        """What a recipe asks for; formats of other programs have embedding and head as the source has them."""
        wanted = recipe.export
        return cls(wanted.format, int(wanted.shard_gb * 1e9), wanted.head_bits if wanted.format == USUAL_FORMAT else 16)


class Exporter(ABC):
    """A format. quantizes: whether a model that is loaded from it quantizes activations, where its stage does. copies: whether
    tokenizer and settings lie in it as the source's folder has them. library: that loads it, as the Hub calls it.
    """

    quantizes = False
    copies = False
    library = "transformers"

    def check(self, model: SourceModel, shared: int) -> None:  # noqa: B027 - most formats hold everything
        """Raises UsageError naming what the model, or groups of this size, have that the format cannot hold.

        shared: inputs that share a scale, 0 for all of a row.
        """

    @abstractmethod
    def write(self, model: SourceModel, checkpoint: Checkpoint, folder: Path, form: Form) -> None:
        """Fills a new folder."""

    @abstractmethod
    def weight_bytes(self, model: SourceModel, sizes: GroupSizes, level_bits: int) -> float:
        """Bytes of all binarized weights."""

    @abstractmethod
    def fidelity(self, model: SourceModel, form: Form) -> str:
        """How a loaded model's weights compare with the checkpoint's, for the log."""

    @abstractmethod
    def loading(self, place: str) -> list[str]:
        """Lines of the model card: how to run it. place: of the folder, or its id on the Hub."""


class FolderExporter(Exporter):
    """A format that is a folder as transformers has them: configuration, tokenizer, and safetensors."""

    copies = True

    @abstractmethod
    def settings(self, model: SourceModel, checkpoint: Checkpoint, form: Form) -> dict[str, Any]:
        """What config.json has beside the source's values."""

    @abstractmethod
    def block(self, model: SourceModel, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a block as the folder has them. stored: as the checkpoint has them."""

    def outer(self, tensors: dict[str, Tensor], form: Form) -> dict[str, Tensor]:
        """Tensors outside the blocks as the folder has them."""
        return tensors

    def named(self, model: SourceModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a block by the names that they have in the folder: those of modules."""
        return tensors

    def write(self, model: SourceModel, checkpoint: Checkpoint, folder: Path, form: Form) -> None:
        """One shard is held in memory at a time."""
        model_folder.copy_metadata(model.folder, folder)
        files.write_json(folder / "config.json", model.exported_config() | self.settings(model, checkpoint, form))
        _write_shards(self._tensors(model, checkpoint, form), folder, form.shard_bytes)

    def _tensors(self, model: SourceModel, checkpoint: Checkpoint, form: Form) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the exported model: everything outside the blocks, then block by block."""
        yield from self.outer(outer_tensors(model, checkpoint), form).items()
        binarized = set(model.binarized_names)
        for index in range(model.blocks):
            interrupt.check()
            stored = self.block(model, checkpoint.read_block(index))
            taken = [name for name in model.block_names(index) if name not in stored and name not in binarized]
            yield from self.named(model, {**model.read(taken), **stored}).items()


def snippet(language: str, *lines: str) -> list[str]:
    """Lines of code as a paragraph of Markdown."""
    return ["", f"```{language}", *lines, "```"]


def outer_tensors(model: SourceModel, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Embedding, head and final norm, where the checkpoint has changed one as it is there."""
    changed = checkpoint.read_outer()
    return {**model.read([name for name in model.outer_names() if name not in changed]), **changed}


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """Safetensors shards of at most `shard_bytes` (a single larger tensor gets its own), and an index when there are several."""
    shards: list[tuple[Path, list[str]]] = []
    total = held_bytes = 0
    held: dict[str, Tensor] = {}

    def flush() -> None:
        path = folder / f"part-{len(shards):05d}"
        files.write_atomic(path, lambda temporary: save_file(held, temporary, metadata={"format": "pt"}))
        shards.append((path, list(held)))
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor.cpu().contiguous()
        held_bytes += size
        total += size
    flush()
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, 1):
        name = model_folder.SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files.write_json(folder / model_folder.INDEX, index)
