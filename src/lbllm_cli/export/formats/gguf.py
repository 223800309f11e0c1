"""One GGUF file with Q8_0 weights, for llama.cpp and what is built on it.

A block of Q8_0 is 32 int8 numbers and a float16 scale; a level is an int8 number times its group's scale. So weights are exact
where groups are whole blocks. Embedding and head keep the source's dtype.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.errors import UsageError
from lbllm_cli.export.base import Exporter, Form, outer_tensors, snippet
from lbllm_cli.export.gguf.architectures import ARCHITECTURES, odd_rope, rope_factors, turned_rows, write_settings
from lbllm_cli.export.gguf.vocabulary import Vocabulary
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.models.model import SourceModel
from lbllm_cli.models.stored import whole_tensors
from lbllm_cli.models.tokenizer import read_tokenizer
from lbllm_cli.pipeline.checkpoint import Checkpoint

NAME = "model.gguf"
_BLOCK, _BLOCK_BYTES = 32, 34
_ROPE_FACTORS = "rope_freqs.weight"


def blocks(packed: PackedWeight) -> Tensor:
    """Rows of Q8_0 blocks, each a float16 scale and 32 numbers: uint8 [out, in / 32 * 34]."""
    levels = packed.whole_levels()
    count = levels.shape[1] // _BLOCK
    parts = (packed.scales_of(_BLOCK).unsqueeze(-1).view(torch.uint8), levels.view(len(levels), count, _BLOCK).view(torch.uint8))
    return torch.cat(parts, dim=-1).flatten(1)


class Gguf(Exporter):
    """A file of its own beside the model card."""

    library = "llama.cpp"

    def check(self, model: SourceModel, shared: int) -> None:
        """Raises UsageError naming what of the model llama.cpp, or a block of 32, cannot hold."""
        if find_spec("gguf") is None:
            raise UsageError("export.format: gguf needs the package gguf; run: pip install gguf")
        config = model.config
        architecture = ARCHITECTURES.get(config.model_type)
        if architecture is None:
            known = ", ".join(ARCHITECTURES)
            raise UsageError(f"export.format: gguf is written for {known}, this is {config.model_type}; take another format")
        if odd := architecture.odd(config) + odd_rope(config):
            raise UsageError(
                f"export.format: gguf: llama.cpp's {architecture.name} has no {', no '.join(odd)}; take another format"
            )
        ragged = sorted({width for _, width in model.binarized_shapes if width % _BLOCK})
        if shared % _BLOCK or ragged:
            found = f"groups of {shared}" if shared % _BLOCK else f"rows of {ragged[0]}"
            raise UsageError(f"export.format: gguf has blocks of {_BLOCK}, which do not divide {found}; take another format")
        Vocabulary(model.folder, config.vocab_size)

    def write(self, model: SourceModel, checkpoint: Checkpoint, folder: Path, form: Form) -> None:
        """One block is held in memory at a time; the file is whole, whatever the size of a shard."""
        files.write_atomic(folder / NAME, lambda temporary: self._write(model, checkpoint, temporary))

    def _write(self, model: SourceModel, checkpoint: Checkpoint, path: Path) -> None:
        import gguf

        architecture = ARCHITECTURES[model.config.model_type]
        writer = gguf.GGUFWriter(path, architecture.name)
        writer.add_name(_name(model.folder.resolve()))
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_settings(writer, model)
        vocabulary = Vocabulary(model.folder, model.config.vocab_size)
        vocabulary.write(writer, read_tokenizer(model.folder, trust_remote_code=False))
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name.upper()], model.blocks)
        binarized = set(model.binarized_names)
        for name, shape in self._shapes(model).items():
            kind = gguf.GGMLQuantizationType[self._kind(model, name, shape, binarized)]
            size, per = gguf.GGML_QUANT_SIZES[kind]
            rows = (*shape[:-1], shape[-1] // size * per)
            key = name if name == _ROPE_FACTORS else names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert key is not None, name
            writer.add_tensor_info(key, rows, np.dtype(np.uint8), prod(rows), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in self._tensors(model, checkpoint):
            writer.write_tensor_data(tensor.cpu().contiguous().view(torch.uint8).numpy())
        writer.close()

    def _shapes(self, model: SourceModel) -> dict[str, tuple[int, ...]]:
        """Of all tensors, in the order in which they are written."""
        order = [*model.outer_names(), *(name for index in range(model.blocks) for name in model.block_names(index))]
        factors = rope_factors(model.config)
        return {name: model.shapes[name] for name in order} | ({} if factors is None else {_ROPE_FACTORS: tuple(factors.shape)})

    def _kind(self, model: SourceModel, name: str, shape: tuple[int, ...], binarized: set[str]) -> str:
        if name in binarized:
            return "Q8_0"
        kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        return "F32" if len(shape) == 1 else kinds[model.source_dtype()]

    def _tensors(self, model: SourceModel, checkpoint: Checkpoint) -> Iterator[Tensor]:
        """In the order of `_shapes`, as they are stored."""
        outer = outer_tensors(model, checkpoint)
        yield from (self._whole(model, name, outer[name]) for name in model.outer_names())
        for index in range(model.blocks):
            interrupt.check()
            stored = checkpoint.read_block(index)
            whole, names = whole_tensors(stored), model.block_names(index)
            owners = {f"{owner}.weight": owner for owner in PackedWeight.owners(stored)}
            read = model.read([name for name in names if name not in owners and name not in whole])
            for name in names:
                if name not in owners:
                    yield self._whole(model, name, whole[name] if name in whole else read[name])
                    continue
                tensor = blocks(PackedWeight.from_tensors(stored, owners[name], model.shapes[name][1]))
                yield self._turned(model, name, tensor)
        if (factors := rope_factors(model.config)) is not None:
            yield factors

    def _whole(self, model: SourceModel, name: str, tensor: Tensor) -> Tensor:
        if tensor.dim() > 1:
            return tensor.to(model.source_dtype())
        offset = model.family.norm_offset if name.endswith("norm.weight") else 0.0
        return self._turned(model, name, tensor.float() + offset)

    def _turned(self, model: SourceModel, name: str, tensor: Tensor) -> Tensor:
        """Rows of q and k in llama.cpp's order."""
        heads: dict[str, Any] = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
        owner = name.split(".")[-2]
        if owner not in heads or not ARCHITECTURES[model.config.model_type].neighbours:
            return tensor
        return tensor[turned_rows(len(tensor), heads[owner])]

    def weight_bytes(self, model: SourceModel, sizes: GroupSizes, level_bits: int) -> float:
        """34 for 32 weights."""
        return model.binarized_parameters * _BLOCK_BYTES / _BLOCK

    def fidelity(self, model: SourceModel, form: Form) -> str:
        """The file is exact; llama.cpp multiplies with activations that it rounds to eight bits in blocks of 32."""
        return "weights are exact; llama.cpp rounds activations to 8 bits as it multiplies"

    def loading(self, place: str) -> list[str]:
        """With llama.cpp."""
        return [f"`{NAME}` is for llama.cpp and programs built on it:", *snippet("sh", f"llama-cli --model {NAME}")]


def _name(folder: Path) -> str:
    """Of a model, for programs that show one: in the hub's cache its folder is named by a commit.

    models--org--toy/snapshots/0123abcd -> toy.
    """
    return folder.parents[1].name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name


FORMAT = Gguf()
