"""The Hugging Face side: which families are supported, one decoder block at a time, embeddings and head."""

import copy
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError, reason
from lbllm_cli.models import folder as source
from lbllm_cli.models.config import DISK_DTYPES, FAMILIES, code_hint, layers, mismatch, one_block, read_configuration, understood
from lbllm_cli.models.folder import TensorEntry

if TYPE_CHECKING:
    from lbllm_cli.recipe.schema import Model

# Linears that read the same input share one Hessian and are fitted as one matrix.
UNITS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
LINEARS = tuple(name for unit in UNITS for name in unit)
_PREFIX = "model.layers."
FINAL_NORM = "model.norm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# One of these is a tokenizer's vocabulary.
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt")
_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    if family not in list(FAMILIES):
        reason = ""
        if any("expert" in key for key in values):
            reason = " (a mixture of experts: most of its weights are outside the linears that are binarized)"
        elif family in ["gpt2", "openai-gpt"]:
            reason = " (its layers are Conv1D, not linear)"
        raise UsageError(f"{folder}: model_type {str(family)[:40]!r} is not supported{reason}; supported: {supported}")
    if method := values.get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise UsageError(f"{folder} is already quantized ({str(method)[:40]}); give the full-precision model")
    # A family's own classes are always there, whatever code the folder brings.
    config = read_configuration(folder, trust_remote_code=False)
    with torch.device("meta"):
        block = layers(one_block(config, 0))[0]
    found = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    if found != set(LINEARS):
        odd = sorted(found ^ set(LINEARS))
        raise UsageError(f"{folder}: the linears of a block are not those of its family: {', '.join(odd)}")
    return config


class Block(nn.Module):
    """One decoder block in evaluation mode, with the masks and positions transformers gives it.

    Called with hidden states [rows, length, hidden], returns the same shape; every row starts at position 0.
    """

    def __init__(self, config: PretrainedConfig, index: int, tensors: dict[str, Tensor], dtype: torch.dtype):
        super().__init__()
        with torch.device("meta"):
            model: Any = one_block(config, index)
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
        return layers(self.model)[0]

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
        """Shape of every tensor that is read, from the configuration; tied embeddings appear once."""
        with understood(self.folder / "config.json"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if self.config.tie_word_embeddings:
            shapes.pop(HEAD, None)
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
        values = source.read_config(self.folder)
        tied = bool(self.config.tie_word_embeddings)
        return values if HEAD not in self.entries or tied else {**values, "tie_word_embeddings": False}

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
        weight = self.read([EMBEDDING])[EMBEDDING].to(self.dtype)
        return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight).requires_grad_(False)

    def head(self) -> nn.Sequential:
        """Final norm and language-model head: hidden [..., hidden] -> logits [..., vocab]."""
        with torch.device("meta"):
            norm: Any = one_block(self.config, 0).norm
        names = [FINAL_NORM, EMBEDDING if self.config.tie_word_embeddings else HEAD]
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
        return DISK_DTYPES[self.entries[name].dtype]

    def source_dtype(self) -> torch.dtype:
        """dtype of the stored embedding: what exports keep."""
        return self.stored_dtype(EMBEDDING)


def choose_device(wanted: str, key: str = "runtime.device") -> torch.device:
    """`auto` is the first GPU, else the CPU. key: what it stands under, for messages.

    Raises UsageError for what is no device, and when a GPU is asked for that this machine has not.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", wanted):
        raise UsageError(f"{key} {wanted}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        wanted = "cuda" if count else "cpu"
    if wanted.startswith("cuda"):
        if not count:
            raise UsageError(f"{key} {wanted}: this torch sees no GPU; set {key} to auto or cpu")
        if int(wanted.partition(":")[2] or 0) >= count:
            raise UsageError(f"{key} {wanted}: this torch sees {count} GPUs, the last is cuda:{count - 1}")
    return torch.device(wanted)


def open_model(recipe: "Model", device: torch.device, weights: bool = True) -> SourceModel:
    """Checks everything about a model that its config and safetensors headers tell; reads no weight.

    One exception: where the configuration ties head and embedding and the files hold both, the two are compared, as transformers
    does, and used apart where they differ. weights: False needs only config.json, for forecasts. Raises UsageError for a missing
    or damaged file, an unsupported family, missing or unknown tensors or other shapes than the configuration's.
    """
    folder = source.resolve(recipe.path, recipe.revision, weights)
    config = load_config(folder)
    stored = weights or source.has_weights(folder)
    entries = source.read_folder(folder) if stored else {}
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
    if device.type == "cpu":
        return torch.float32
    stored: Any = DISK_DTYPES.get(entries[EMBEDDING].dtype) if EMBEDDING in entries else getattr(config, "dtype", None)
    return stored if stored in _TORCH_DTYPES.values() else torch.bfloat16


def open_tokenizer(recipe: "Model", folder: Path) -> Any:
    """The model's tokenizer. Raises UsageError when the folder has none."""
    return read_tokenizer(folder, recipe.trust_remote_code)


def read_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """Tokenizer of a model folder. Raises UsageError when it has none that can be used.

    trust_remote_code: whether code that the folder brings may run; transformers would ask on the terminal.
    """
    if not any(path.exists() for name in _TOKENIZERS for path in folder.glob(name)):
        raise UsageError(f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model; copy the model's own")
    settings = folder / "tokenizer_config.json"
    hint = code_hint(files.read_json(settings), trust_remote_code) if settings.exists() else ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here; all mean that the files are unusable
        raise UsageError(f"{folder}: the tokenizer cannot be loaded: {reason(error)}{hint}") from None
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UsageError(f"{settings}: model_max_length: expected a number, got {str(tokenizer.model_max_length)[:40]}")
    return tokenizer
