"""A model folder on disk: where it is, which tensors its safetensors files hold, and reading them by slices."""

import hashlib
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lbllm_cli.core import files
from lbllm_cli.core.errors import RunError, UsageError, reason
from lbllm_cli.core.tensor_files import Part, TensorEntry, finite, first_not_finite, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_METADATA_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template*",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# Values that are looked at together where a tensor is not kept.
PIECE = 16 << 20


def _shards(index: Path) -> dict[str, str]:
    """The index's map from tensor to file. Raises UsageError for one that names files elsewhere: they are not the model's."""
    values = files.read_json(index)
    parts = values if isinstance(values, dict) else {}
    weight_map, metadata = parts.get("weight_map"), parts.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise UsageError(f"{index} is not a safetensors index: it has no weight_map of tensors and files; download it again")
    if not isinstance(metadata, dict):  # transformers writes into it
        raise UsageError(f"{index} is not a safetensors index: metadata is {type(metadata).__name__}; download it again")
    for name in sorted(set(weight_map.values())):
        place = PurePosixPath(name)
        if not place.name or place.is_absolute() or ".." in place.parts or not name.isprintable() or len(name) > 255:
            raise UsageError(f"{index} names {name[:80]!r}; expected the names of files in {index.parent}; download it again")
    return weight_map


def read_folder(folder: Path) -> dict[str, TensorEntry]:
    """Tensor entries of a model folder, sharded or single.

    Raises UsageError when there are no safetensors weights or a shard is missing or damaged.
    """
    # In the order of transformers, where both are there.
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    index = folder / INDEX
    if index.exists():
        weight_map = _shards(index)
        shards = sorted(set(weight_map.values()))
        missing = [name for name in shards if not (folder / name).exists()]
        if missing:
            raise UsageError(f"{folder}: {len(missing)} of {len(shards)} weight files are missing: {', '.join(missing)}")
        entries: dict[str, TensorEntry] = {}
        for shard in shards:
            found = read_header(folder / shard)
            if twice := sorted(entries.keys() & found.keys()):
                first = entries[twice[0]].file.name
                raise UsageError(f"{folder}: {twice[0][:200]} is in {first} and in {shard}; download both again")
            entries |= found
        lost = sorted(set(weight_map) - set(entries))
        if lost:
            first = lost[0][:200]
            raise UsageError(f"{index} names {len(lost)} tensors that no shard holds, first {first}; download the model again")
        return entries
    other = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf", "*.safetensors") for path in folder.glob(pattern))
    got = f"found {', '.join(other[:3])}" if other else "found no weight file"
    raise UsageError(
        f"{folder} has no weights: expected {SINGLE} or {INDEX}, {got}. Only safetensors are read; convert other formats first"
    )


def has_weights(folder: Path) -> bool:
    """Whether the folder holds, or claims to hold, safetensors weights."""
    return (folder / INDEX).exists() or (folder / SINGLE).exists()


def read_tensors(entries: dict[str, TensorEntry], names: list[str], device: torch.device) -> dict[str, Tensor]:
    """Reads some tensors on to `device`, in the dtype on disk.

    Raises RunError naming the first tensor that holds NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted({entries[name].file for name in names}):
        with safe_open(file, framework="pt", device=str(device)) as handle:
            for name in names:
                if entries[name].file == file:
                    tensors[name] = _stored(handle, name, entries[name].part)
    if (bad := first_not_finite(tensors)) is not None:
        raise _not_finite(entries, bad)
    return tensors


def _stored(handle: Any, name: str, part: Part | None) -> Tensor:
    """A tensor of an open file; of a larger one no more is read than an index on its first axis."""
    if part is None:
        whole: Tensor = handle.get_tensor(name)
        return whole
    found: Tensor = handle.get_tensor(part.name) if part.index is None else handle.get_slice(part.name)[part.index]
    return part.of(found).contiguous()


def _not_finite(entries: dict[str, TensorEntry], name: str) -> RunError:
    return RunError(f"{name} in {entries[name].file} holds NaN or infinity; download the model again")


def _pieces(entry: TensorEntry, name: str) -> Iterator[Tensor]:
    """A tensor outside the blocks, which is stored whole, by its rows, on the CPU, about PIECE values at a time."""
    name = name if entry.part is None else entry.part.name
    with safe_open(entry.file, framework="pt") as handle:
        if not entry.shape:
            yield handle.get_tensor(name)
            return
        rows = handle.get_slice(name)
        step = max(1, PIECE // max(1, math.prod(entry.shape[1:])))
        for start in range(0, entry.shape[0], step):
            yield rows[start : start + step]


def check_finite(entries: dict[str, TensorEntry], names: list[str]) -> None:
    """Reads some tensors piece by piece and keeps nothing. Raises RunError naming the first with NaN or infinity."""
    for name in names:
        if not all(finite(piece) for piece in _pieces(entries[name], name)):
            raise _not_finite(entries, name)


def equal(entries: dict[str, TensorEntry], first: str, second: str, dtype: torch.dtype) -> bool:
    """Whether two stored tensors are the same as tensors of `dtype`. Stops reading at the first difference."""
    if entries[first].shape != entries[second].shape:
        return False
    pairs = zip(_pieces(entries[first], first), _pieces(entries[second], second), strict=True)
    return all(torch.equal(one.to(dtype), other.to(dtype)) for one, other in pairs)


def identity(folder: Path, entries: dict[str, TensorEntry]) -> str:
    """Hash that tells one model folder from another: config, tensor names, shapes, dtypes, and 64 KiB at both ends of every
    weight file. Reading all of a 140 GB model for it would take minutes before every command.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in sorted(entries):
        entry = entries[name]
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
    for file in sorted({entry.file for entry in entries.values()}):
        size = file.stat().st_size
        with file.open("rb") as handle:
            digest.update(handle.read(65536))
            handle.seek(max(0, size - 65536))
            digest.update(handle.read(65536))
    return digest.hexdigest()


def metadata_files(folder: Path) -> Iterator[Path]:
    """Everything beside the weights that a copy of the model needs: configs, tokenizer, chat template, licence."""
    found = {path for pattern in _METADATA_FILES for path in folder.glob(pattern) if path.is_file()}
    yield from sorted(found)


def copy_metadata(folder: Path, target: Path) -> None:
    """Copies tokenizer, generation config, chat template and licence byte for byte; config.json is left to the caller.

    Saving them again through transformers changes tokenizer_class and fails on older generation configs.
    """
    for path in metadata_files(folder):
        if path.name != "config.json":
            shutil.copyfile(path, target / path.name)


def check_folder(folder: Path) -> None:
    """Raises UsageError for what no library that reads a model folder should open: a pipe, a socket, a device."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            files.check_regular(path)


def resolve(path: str, revision: str | None, weights: bool, key: str = "model.path") -> Path:
    """Local folder of a model: the folder itself, or a snapshot of a Hugging Face id.

    weights: False fetches configuration and tokenizer only. key: what the path stands under, for messages. Raises UsageError when
    neither exists or cannot be had.
    """
    local = files.user_path(path, key)
    if local.is_dir():
        check_folder(local)
        return local
    if local.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise UsageError(f"{key} {path} is not a folder; give a folder with config.json or a Hugging Face id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [*_METADATA_FILES, "README.md", *(["*.safetensors", INDEX] if weights else [])]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise UsageError(
            f"{key} {path} is gated: accept its licence at https://huggingface.co/{path}, "
            "then set HF_TOKEN or run `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UsageError(f"{key} {path}: no such folder here and no such model on the Hugging Face hub") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"{key} {path}: no such folder, and it cannot be fetched from the Hugging Face hub ({reason(error)}). "
            "Give a local folder, or run once with a network"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as plain values. Raises UsageError when it is missing or not JSON."""
    file = folder / "config.json"
    try:
        values = files.read_json(file)
    except FileNotFoundError:
        raise UsageError(f"{folder} has no config.json; expected a Hugging Face model folder") from None
    if not isinstance(values, dict):
        raise UsageError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values
