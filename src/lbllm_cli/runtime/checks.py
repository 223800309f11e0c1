"""What a packed folder must hold before anything computes with it: kernels trust shapes and tables."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.core.errors import LbllmError, UsageError, reason
from lbllm_cli.core.headers import TensorEntry, mismatch, read_header
from lbllm_cli.core.tensor_files import finite
from lbllm_cli.format.names import CLIP_RANGE, CLIP_UNIT, LATTICE_MAX
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.runtime.rows import StoredRows

_DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.int32: "I32"}


def check_linears(layer: nn.Module, linears: list[str]) -> None:
    """Raises ValueError where `linears` names any that a decoder layer has not, or does not name all."""
    own = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    if sorted(linears) != sorted(own):
        expected = f"the linears of a block, {', '.join(own)}"
        raise ValueError(f"quantization_config.linears: expected {expected}, got {str(linears)[:80]}; export it again")


def _packed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    kinds = PackedLinear | ActQuantizer | StoredRows
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """What a file has of such a module in a dtype of its own."""
    parameters = dict(module.named_parameters(recurse=False)) if isinstance(module, StoredRows) else {}
    return parameters | dict(module.named_buffers(recurse=False))


def _own_entries(model: Any, paths: list[Path]) -> dict[str, TensorEntry]:
    """Stored tensors by their names in `model`, which may be the decoder alone, without the head."""
    entries = {name: entry for path in paths for name, entry in read_header(path).items()}
    prefix = model.base_model_prefix
    if hasattr(model, prefix):
        return entries
    return {name.removeprefix(f"{prefix}."): entry for name, entry in entries.items() if name.startswith(f"{prefix}.")}


def check_files(model: Any, paths: list[Path]) -> None:
    """Compares the headers of a folder's shards with what `model` will read from them.

    transformers itself fills a tensor that is absent with whatever lies in memory, and casts another dtype in silence. Raises
    ValueError naming the first tensor that is absent, unknown or of another shape or dtype, UsageError for a damaged shard.
    """
    entries = _own_entries(model, paths)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in _packed(model):
        for part, tensor in _stored(module).items():
            entry, expected = entries.pop(f"{name}.{part}", None), (_DTYPES[tensor.dtype], shapes.pop(f"{name}.{part}"))
            got = "nothing" if entry is None else f"{entry.dtype} {entry.shape}"
            if entry is None or (entry.dtype, entry.shape) != expected:
                raise ValueError(f"{name}.{part}: expected {expected[0]} {expected[1]}, got {got}; export it again")
    # Loading ties them, or leaves them apart where both are stored and differ.
    tied = set(model.all_tied_weights_keys)
    if problem := mismatch(entries, {name: shape for name, shape in shapes.items() if name not in tied}, tied):
        raise ValueError(f"the folder {problem}; export it again")


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Around loading a model folder: raises UsageError that names the folder where it cannot be loaded."""
    try:
        yield
    except (LbllmError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: loading does what dozens of keys of config.json say
        raise UsageError(f"{folder} cannot be loaded: {reason(error)}") from None


def check_placed(model: nn.Module) -> None:
    """Raises ValueError naming a tensor that `device_map` left on disk: nothing is there to be checked, or to compute with."""
    if left := next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None):
        raise ValueError(
            f"{left} was left on disk by device_map, a packed model is in memory as a whole; give a device_map, or max_memory, "
            "that has room for all of it"
        )


def check_values(model: nn.Module, prefix: str = "") -> None:
    """Raises ValueError naming a loaded tensor whose values have no meaning in the format. prefix: of names in messages."""
    for name, tensor in (*model.named_parameters(prefix), *model.named_buffers(prefix)):
        if not finite(tensor):
            raise ValueError(f"{name} holds NaN or infinity; export it again")
    least, most = (round(factor * CLIP_UNIT) for factor in CLIP_RANGE)
    for own, module in _packed(model):
        if not isinstance(module, ActQuantizer):
            continue
        name = f"{prefix}.{own}" if prefix else own
        levels, top = module.act_levels.int(), LATTICE_MAX if module.bits < 8 else 255
        if int(levels.max()) > top or bool((levels[:, 1:] <= levels[:, :-1]).any()):
            expected = f"rows that ascend within 0..{top}"
            raise ValueError(f"{name}.act_levels: expected {expected}, got {levels.tolist()}; export it again")
        if module.act_zero.numel() and not bool((levels == module.act_zero.int().unsqueeze(1)).any(1).all()):
            zeros = module.act_zero.tolist()
            raise ValueError(f"{name}.act_zero: expected one of act_levels in each row, got {zeros}; export it again")
        if int(module.act_clip.min()) < least or int(module.act_clip.max()) > most:
            clips = module.act_clip.tolist()
            raise ValueError(f"{name}.act_clip: expected {least} to {most}, got {clips}; export it again")
