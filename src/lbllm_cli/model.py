"""The Hugging Face side: which families are supported, one decoder block at a time, embeddings and head."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from lbllm_cli import source
from lbllm_cli.errors import UsageError
from lbllm_cli.source import TensorEntry

if TYPE_CHECKING:
    from lbllm_cli.recipe import Model

# Linears that read the same input share one Hessian and are fitted as one matrix.
UNITS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
LINEARS = tuple(name for unit in UNITS for name in unit)
FAMILIES = {"llama": "Llama 1, 2, 3 and SmolLM", "mistral": "Mistral", "qwen2": "Qwen2 and Qwen2.5", "qwen3": "Qwen3"}
_PREFIX = "model.layers."
FINAL_NORM = "model.norm.weight"
_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DISK_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def block_prefix(index: int) -> str:
    """Name prefix of a block's tensors: 3 -> "model.layers.3."."""
    return f"{_PREFIX}{index}."


def load_config(folder: Path) -> PretrainedConfig:
    """Config of a supported model.

    Raises UsageError naming what is not supported: the family, mixture of experts, an already quantized model.
    """
    values = source.read_config(folder)
    family = values.get("model_type")
    supported = "; ".join(f"{key} ({text})" for key, text in FAMILIES.items())
    if family not in FAMILIES:
        reason = ""
        if any("expert" in key for key in values):
            reason = " (a mixture of experts: most of its weights are outside the linears that are binarized)"
        elif family in {"gpt2", "openai-gpt"}:
            reason = " (its layers are Conv1D, not linear)"
        raise UsageError(f"{folder}: model_type {family!r} is not supported{reason}; supported: {supported}")
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method")
        raise UsageError(f"{folder} is already quantized ({method}); give the full-precision model")
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        block = _layers(_one_block(config, 0))[0]
    found = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    if found != set(LINEARS):
        odd = sorted(found ^ set(LINEARS))
        raise UsageError(f"{folder}: the linears of a block are not those of its family: {', '.join(odd)}")
    return config


def _one_block(config: PretrainedConfig, index: int) -> nn.Module:
    """The model with only block `index`: masks, rotary embedding and layer type are then transformers' own."""
    single = copy.deepcopy(config)
    single.num_hidden_layers = 1
    types = getattr(config, "layer_types", None)
    if types:
        single.layer_types = [types[index]]
    return AutoModel.from_config(single)


def _layers(model: Any) -> nn.ModuleList:
    layers: nn.ModuleList = model.layers
    return layers


class Block(nn.Module):
    """One decoder block in evaluation mode, with the masks and positions transformers gives it.

    Called with hidden states [rows, length, hidden], returns the same shape; every row starts at position 0.
    """

    def __init__(self, config: PretrainedConfig, index: int, tensors: dict[str, Tensor], dtype: torch.dtype):
        super().__init__()
        with torch.device("meta"):
            model: Any = _one_block(config, index)
        # Buffers of the rotary embedding are computed, not stored: built on meta they would have no values.
        model.rotary_emb = type(model.rotary_emb)(config)
        model.norm, model.embed_tokens = nn.Identity(), nn.Identity()
        prefix = block_prefix(index)
        local = {f"layers.0.{name.removeprefix(prefix)}": tensor.to(dtype) for name, tensor in tensors.items()}
        model.load_state_dict(local, strict=True, assign=True)
        device = next(iter(tensors.values())).device
        self.model = model.to(device).eval().requires_grad_(False)
        self.prefix = prefix
        self.dtype = dtype

    @property
    def layer(self) -> nn.Module:
        """transformers' own decoder layer."""
        return _layers(self.model)[0]

    def linear(self, name: str) -> nn.Linear:
        """A linear by its name in the block, for example "mlp.up_proj"."""
        module = self.layer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def sharing(self) -> "Block":
        """A copy whose linears can be replaced one by one; tensors are shared until then."""
        twin = copy.copy(self)
        memo = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        twin._modules = {"model": copy.deepcopy(self.model, memo)}
        return twin

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Replaces a linear's weight, [out, in], cast to the block's dtype."""
        self.linear(name).weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model(inputs_embeds=hidden, use_cache=False).last_hidden_state


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

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor, from the configuration; tied embeddings appear once."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if self.config.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        return shapes

    @cached_property
    def binarized_names(self) -> list[str]:
        """Weights that are binarized, in block order."""
        return [f"{block_prefix(i)}{name}.weight" for i in range(self.blocks) for name in LINEARS]

    def count(self, names: list[str]) -> int:
        """Parameters in some tensors."""
        return sum(torch.Size(self.shapes[name]).numel() for name in names)

    @property
    def binarized_share(self) -> float:
        """Share of all parameters that is binarized."""
        return self.count(self.binarized_names) / self.count(list(self.shapes))

    def block_names(self, index: int) -> list[str]:
        """Names of all tensors of a block."""
        return [name for name in self.shapes if name.startswith(block_prefix(index))]

    def outer_names(self) -> list[str]:
        """Names of the tensors outside the blocks: embeddings, final norm, head."""
        return [name for name in self.shapes if not name.startswith(_PREFIX)]

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors on the device, in the dtype on disk."""
        return source.read_tensors(self.entries, names, self.device)

    def block(self, index: int, replacements: dict[str, Tensor] | None = None) -> Block:
        """Block `index`; replacements: full names -> tensors used instead of the stored ones."""
        wanted = replacements or {}
        tensors = self.read([name for name in self.block_names(index) if name not in wanted])
        return Block(self.config, index, {**tensors, **wanted}, self.dtype)

    def embed(self) -> nn.Embedding:
        """Token embedding on the device, in the compute dtype."""
        name = "model.embed_tokens.weight"
        weight = self.read([name])[name].to(self.dtype)
        return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight).requires_grad_(False)

    def head(self) -> nn.Sequential:
        """Final norm and language-model head: hidden [..., hidden] -> logits [..., vocab]."""
        with torch.device("meta"):
            norm: Any = _one_block(self.config, 0).norm
        names = [FINAL_NORM, "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"]
        tensors = self.read(names)
        norm.load_state_dict({"weight": tensors[names[0]].to(self.dtype)}, assign=True)
        vocab, hidden = self.shapes[names[1]]
        linear = nn.Linear(hidden, vocab, bias=False, device="meta")
        linear.weight = nn.Parameter(tensors[names[1]].to(self.dtype))
        return nn.Sequential(norm, linear).requires_grad_(False)

    def norm_names(self, index: int) -> list[str]:
        """Names of a block's norm weights."""
        return [name for name in self.block_names(index) if name.endswith("norm.weight")]

    def identity(self) -> str:
        """Hash of the model folder, see `source.identity`."""
        return source.identity(self.folder, self.entries)

    def stored_dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor on disk."""
        return _DISK_DTYPES[self.entries[name].dtype]

    def source_dtype(self) -> torch.dtype:
        """dtype of the stored embedding: what exports keep."""
        return self.stored_dtype("model.embed_tokens.weight")


def choose_device(wanted: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises UsageError when a GPU is asked for and there is none."""
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"runtime.device {wanted}: this torch sees no GPU; set runtime.device to auto or cpu")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def open_model(recipe: "Model", device: torch.device, weights: bool = True) -> SourceModel:
    """Checks everything about a model that its config and safetensors headers tell; reads no weight.

    weights: False needs only config.json, for forecasts. Raises UsageError for a missing or damaged file, an unsupported
    family, missing tensors or other shapes than the configuration's.
    """
    folder = source.resolve(recipe.path, recipe.revision, weights)
    config = load_config(folder)
    entries = source.read_folder(folder) if weights or source.has_weights(folder) else {}
    model = SourceModel(folder, config, entries, device, _compute_dtype(recipe, config, entries, device))
    if entries:
        missing = [name for name in model.shapes if name not in entries]
        if missing:
            raise UsageError(f"{folder} lacks {len(missing)} tensors, first {missing[0]}; download the model again")
        for name, shape in model.shapes.items():
            if entries[name].shape != shape:
                raise UsageError(f"{folder}: {name} has shape {list(entries[name].shape)}, config.json says {list(shape)}")
            if entries[name].dtype not in _DISK_DTYPES:
                raise UsageError(f"{folder}: {name} is {entries[name].dtype}; expected float32, bfloat16 or float16")
    return model


def _compute_dtype(
    recipe: "Model", config: PretrainedConfig, entries: dict[str, TensorEntry], device: torch.device
) -> torch.dtype:
    if recipe.dtype != "source":
        return _TORCH_DTYPES[recipe.dtype]
    if device.type == "cpu":
        return torch.float32
    name = "model.embed_tokens.weight"
    stored: Any = _DISK_DTYPES[entries[name].dtype] if name in entries else getattr(config, "dtype", None)
    return stored if stored in _TORCH_DTYPES.values() else torch.bfloat16


def open_tokenizer(recipe: "Model", folder: Path) -> Any:
    """The model's tokenizer. Raises UsageError when the folder has none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UsageError(f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model; copy the model's own")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=recipe.trust_remote_code)
    except Exception as error:  # transformers raises many kinds here; all mean that the files are unusable
        raise UsageError(f"{folder}: the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
