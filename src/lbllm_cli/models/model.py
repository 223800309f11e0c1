"""A full-precision model that is never whole in memory: its tensors, one decoder block at a time, embeddings and head."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lbllm_cli.core import model_folder
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.headers import TensorEntry, mismatch
from lbllm_cli.core.tensor_files import DISK_DTYPES
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.models import folder as source
from lbllm_cli.models.block import BLOCKS, Block, block_prefix, block_units
from lbllm_cli.models.config import check_family, module_shapes, one_block, read_configuration, understood
from lbllm_cli.models.families import FAMILIES, Family
from lbllm_cli.models.head import Head
from lbllm_cli.models.inner import inner_config, inner_entries, inner_type, inner_values
from lbllm_cli.models.layout import as_stored, named_entries
from lbllm_cli.runtime.backend import Backend, backend_of
from lbllm_cli.runtime.experts import DOWN, expert_of
from lbllm_cli.runtime.units import Units

if TYPE_CHECKING:
    from lbllm_cli.recipe.schema import Model, Ptq

FINAL_NORM = "model.norm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(folder: Path) -> PretrainedConfig:
    """Config of a supported model.

    Raises UsageError naming what is not supported: the family, or an already quantized model.
    """
    values = model_folder.read_config(folder)
    kind = inner_type(values) or values.get("model_type")
    supported = "; ".join(f"{key} ({family.text})" for key, family in FAMILIES.items())
    if kind not in list(FAMILIES):
        why = " (its layers are Conv1D, not linear)" if kind in ["gpt2", "openai-gpt"] else ""
        raise UsageError(
            f"{folder}: model_type {str(kind)[:40]!r} is not supported{why}; supported: {supported}. docs/adding.md says how to "
            "add one"
        )
    if method := values.get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, dict) else method
        more = ", a copy of it in bfloat16" if kind == "gpt_oss" else ""
        raise UsageError(f"{folder} is already quantized ({str(method)[:40]}); give the full-precision model{more}")
    # A family's own classes are always there, whatever code the folder brings.
    config = read_configuration(folder, trust_remote_code=False)
    if inner_type(values) is not None:
        config = inner_config(config, values)
        check_family(folder / "config.json", config)
    return config


def read_entries(folder: Path, config: PretrainedConfig) -> dict[str, TensorEntry]:
    """Tensors of a model folder of a known family, by the names that they have here. Raises UsageError as `read_folder`."""
    entries, family = inner_entries(model_folder.read_folder(folder)), FAMILIES[config.model_type]
    if not family.stored:
        return entries
    with understood(folder / "config.json"):
        return named_entries(family, entries, module_shapes(config))


@dataclass(frozen=True)
class SourceModel:
    """A full-precision model that is never whole in memory.

    entries: tensors on disk, by name; empty when only config.json is at hand (forecasts).
    """

    folder: Path
    config: PretrainedConfig
    entries: dict[str, TensorEntry]
    device: torch.device
    dtype: torch.dtype

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def family(self) -> Family:
        """What running a block cannot tell."""
        return FAMILIES[self.config.model_type]

    @property
    def backend(self) -> Backend:
        """Of the device that blocks are computed on."""
        return backend_of(self.device)

    @cached_property
    def units(self) -> Units:
        """Linears of a block that are binarized, those together that read the same tensor."""
        with understood(self.folder / "config.json"):
            return block_units(self.config)

    @property
    def linears(self) -> tuple[str, ...]:
        """Their names in the block, in order."""
        return tuple(name for unit in self.units for name in unit)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that is read, from the configuration; tied embeddings appear once."""
        with understood(self.folder / "config.json"):
            shapes = module_shapes(self.config)
        if self.config.tie_word_embeddings:
            shapes.pop(HEAD, None)
        return shapes

    @cached_property
    def binarized_names(self) -> list[str]:
        """Weights that are binarized, in block order."""
        return [f"{block_prefix(i)}{name}.weight" for i in range(self.blocks) for name in self.linears]

    @cached_property
    def binarized_shapes(self) -> list[tuple[int, int]]:
        """Shapes of a block's linears, in order; all blocks have the same."""
        shapes = (self.shapes[f"{block_prefix(0)}{name}.weight"] for name in self.linears)
        return [(shape[0], shape[1]) for shape in shapes]

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a block's linears, by name in the block and in order."""
        return dict(zip(self.linears, self.binarized_shapes, strict=True))

    def group_sizes(self, settings: "Ptq") -> GroupSizes:
        """Of its linears, as a recipe asks for them. Raises UsageError for what does not fit the model."""
        try:
            return GroupSizes.matching(settings.group_size, settings.group_sizes, self.blocks, self.units)
        except ValueError as error:
            raise UsageError(f"ptq.group_sizes: {error}") from None

    @property
    def binarized_parameters(self) -> int:
        """Weights that are binarized, of all blocks."""
        return self.blocks * sum(rows * width for rows, width in self.binarized_shapes)

    def count(self, names: list[str]) -> int:
        """Parameters in some tensors."""
        return sum(torch.Size(self.shapes[name]).numel() for name in names)

    @property
    def experts(self) -> tuple[int, int] | None:
        """Of a mixture: experts in a block, and how many of them a token chooses."""
        numbers = [place[1] for place in map(expert_of, self.linears) if place is not None]
        return (max(numbers) + 1, int(self.config.num_experts_per_tok)) if numbers else None

    @property
    def kv_width(self) -> int:
        """Width of a token's keys, and of its values."""
        heads = int(self.config.num_attention_heads)
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        return int(self.config.num_key_value_heads) * int(width)

    @property
    def inner(self) -> int:
        """Width of what a token's MLP, or all experts that it chooses, keep between their linears."""
        widths = {name: self.shapes[f"{block_prefix(0)}{name}.weight"][1] for name in self.linears if name.endswith(f".{DOWN}")}
        if self.experts is None:
            return sum(widths.values())
        return self.experts[1] * max(widths.values())

    @property
    def binarized_share(self) -> float:
        """Share of all parameters that is binarized."""
        return self.binarized_parameters / self.count(list(self.shapes))

    def block_names(self, index: int) -> list[str]:
        """Names of all tensors of a block."""
        return self._names_of_blocks[index]

    @cached_property
    def _names_of_blocks(self) -> list[list[str]]:
        # A mixture of experts has 20,000 names, and a forecast asks for those of a block a hundred times.
        found: list[list[str]] = [[] for _ in range(self.blocks)]
        for name in self.shapes:
            if name.startswith(BLOCKS):
                found[int(name.removeprefix(BLOCKS).partition(".")[0])].append(name)
        return found

    def outer_names(self) -> list[str]:
        """Names of the tensors outside the blocks: embeddings, final norm, head."""
        return [name for name in self.shapes if not name.startswith(BLOCKS)]

    def check_outer(self) -> None:
        """Reads the tensors outside the blocks once, piece by piece: head and norm are not needed before a stage's end.

        Raises RunError naming the first that holds NaN or infinity.
        """
        source.check_finite(self.entries, self.outer_names())

    def check_tensors(self) -> None:
        """Compares what is stored with what the configuration names. Raises UsageError naming the first tensor that differs."""
        tied = {HEAD} if self.config.tie_word_embeddings else set()
        if problem := mismatch(self.entries, self.shapes, tied):
            raise UsageError(f"{self.folder}: {problem}; download the model again, or mend config.json")

    def exported_config(self) -> dict[str, Any]:
        """config.json for a copy of the model: the source's values, but whether head and embedding are one as it really is."""
        values = model_folder.read_config(self.folder)
        tied = bool(self.config.tie_word_embeddings)
        if inner_type(values) is not None:
            values = inner_values(values, tied)
        return values if HEAD not in self.entries or tied else {**values, "tie_word_embeddings": False}

    def as_stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of whole blocks, or outside them, by the names and in the shapes that the source's files have."""
        return as_stored(self.family, tensors, self.experts[0] if self.experts else 0)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors on the device, in the dtype on disk."""
        return source.read_tensors(self.entries, names, self.device)

    def block(self, index: int, replacements: dict[str, Tensor] | None = None) -> Block:
        """Block `index`; replacements: full names -> tensors used instead of the stored ones."""
        wanted = replacements or {}
        tensors = self.read([name for name in self.block_names(index) if name not in wanted])
        return Block(self.config, index, {**tensors, **wanted}, self.dtype, self.units)

    def embed(self) -> nn.Embedding:
        """Token embedding on the device, in the compute dtype."""
        weight = self.read([EMBEDDING])[EMBEDDING].to(self.dtype)
        if (scale := self.family.embedding_scale(self.config)) != 1:
            # Gemma's factor is rounded to the compute dtype before it multiplies.
            weight = weight * torch.tensor(scale, dtype=self.dtype, device=weight.device)
        return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight).requires_grad_(False)

    def head(self) -> nn.Sequential:
        """Final norm and `Head`: hidden [..., hidden] -> logits [..., vocab]."""
        with torch.device("meta"):
            norm: Any = one_block(self.config, 0).norm
        names = [FINAL_NORM, EMBEDDING if self.config.tie_word_embeddings else HEAD]
        tensors = self.read(names)
        norm.load_state_dict({"weight": tensors[names[0]].to(self.dtype)}, assign=True)
        family, weight = self.family, tensors[names[1]].to(self.dtype)
        head = Head(weight, family.logit_divisor(self.config), family.logit_cap(self.config))
        return nn.Sequential(norm, head).requires_grad_(False)

    def norm_names(self, index: int) -> list[str]:
        """Names of a block's norm weights."""
        return [name for name in self.block_names(index) if name.endswith("norm.weight")]

    def identity(self) -> str:
        """Hash of the model folder, see `model_folder.identity`."""
        return model_folder.identity(self.folder, self.entries)

    def stored_dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor on disk."""
        return DISK_DTYPES[self.entries[name].dtype]

    def source_dtype(self) -> torch.dtype:
        """dtype of the stored embedding: what exports keep."""
        return self.stored_dtype(EMBEDDING)


def open_model(recipe: "Model", device: torch.device, weights: bool = True) -> SourceModel:
    """Checks everything about a model that its config and safetensors headers tell; reads no weight.

    One exception: where the configuration ties head and embedding and the files hold both, the two are compared, as transformers
    does, and used apart where they differ. weights: False needs only config.json, for forecasts. Raises UsageError for a missing
    or damaged file, an unsupported family, missing or unknown tensors or other shapes than the configuration's.
    """
    folder = model_folder.resolve(recipe.path, recipe.revision, weights)
    config = load_config(folder)
    stored = weights or model_folder.has_weights(folder)
    entries = read_entries(folder, config) if stored else {}
    dtype = _compute_dtype(recipe, config, entries, device)
    if config.tie_word_embeddings and {EMBEDDING, HEAD} <= set(entries):
        config.tie_word_embeddings = source.equal(entries, EMBEDDING, HEAD, dtype)
    model = SourceModel(folder, config, entries, device, dtype)
    if stored:
        model.check_tensors()
    return model


def _compute_dtype(
    recipe: "Model", config: PretrainedConfig, entries: dict[str, TensorEntry], device: torch.device
) -> torch.dtype:
    if recipe.dtype != "source":
        return _TORCH_DTYPES[recipe.dtype]
    if (usual := backend_of(device).usual_dtype) is not None:
        return usual
    stored: Any = DISK_DTYPES.get(entries[EMBEDDING].dtype) if EMBEDDING in entries else getattr(config, "dtype", None)
    return stored if stored in _TORCH_DTYPES.values() else torch.bfloat16
