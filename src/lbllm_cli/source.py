"""A model folder on disk: where it is, which tensors its safetensors files hold, and reading them by slices."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lbllm_cli.errors import RunError, UsageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_METADATA_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template*",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: shard file, safetensors dtype name, shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        size = _DTYPES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensor entries of one safetensors file, from its header alone; no weight is read.

    Raises UsageError when the file is missing, truncated or not safetensors.
    """
    again = f"download {path.name} again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise UsageError(f"{path} is not a complete safetensors file ({size} bytes); {again}")
            header = json.loads(file.read(length))
        entries = {
            name: TensorEntry(path, item["dtype"], tuple(item["shape"]))
            for name, item in header.items()
            if name != "__metadata__"
        }
        end = max((item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"), default=0)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing; {again}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UsageError(f"{path} has a corrupt safetensors header; {again}") from None
    if 8 + length + end != size:
        raise UsageError(f"{path} is truncated or padded: expected {8 + length + end} bytes, got {size}; {again}")
    unknown = sorted({entry.dtype for entry in entries.values()} - set(_DTYPES))
    if unknown:
        raise UsageError(f"{path} holds tensors of dtype {', '.join(unknown)}; expected float32, bfloat16 or float16")
    return entries


def read_folder(folder: Path) -> dict[str, TensorEntry]:
    """Tensor entries of a model folder, sharded or single.

    Raises UsageError when there are no safetensors weights or a shard is missing or damaged.
    """
    index = folder / INDEX
    if index.exists():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{index} is not a safetensors index; download it again") from None
        missing = [name for name in shards if not (folder / name).exists()]
        if missing:
            raise UsageError(f"{folder}: {len(missing)} of {len(shards)} weight files are missing: {', '.join(missing)}")
        entries = {name: entry for shard in shards for name, entry in read_header(folder / shard).items()}
        lost = sorted(set(weight_map) - set(entries))
        if lost:
            raise UsageError(f"{index} names {len(lost)} tensors that no shard holds, first {lost[0]}; download the model again")
        return entries
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    other = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf", "*.safetensors") for path in folder.glob(pattern))
    found = f"found {', '.join(other[:3])}" if other else "found no weight file"
    raise UsageError(
        f"{folder} has no weights: expected {SINGLE} or {INDEX}, {found}. Only safetensors are read; convert other formats first"
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
                    tensors[name] = handle.get_tensor(name)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RunError(f"{name} in {entries[name].file} holds NaN or infinity; download the model again")
    return tensors


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


def resolve(path: str, revision: str | None, weights: bool) -> Path:
    """Local folder of a model: the folder itself, or a snapshot of a Hugging Face id.

    weights: False fetches configuration and tokenizer only. Raises UsageError when neither exists or cannot be had.
    """
    local = Path(os.path.expanduser(path))
    if local.is_dir():
        return local
    if local.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise UsageError(f"model.path {path} is not a folder; give a folder with config.json or a Hugging Face id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [*_METADATA_FILES, *(["*.safetensors", INDEX] if weights else [])]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise UsageError(
            f"model.path {path} is gated: accept its licence at https://huggingface.co/{path}, "
            "then set HF_TOKEN or run `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UsageError(f"model.path {path}: no such folder here and no such model on the Hugging Face hub") from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"model.path {path}: no such folder, and it cannot be fetched from the Hugging Face hub ({reason}). "
            "Give a local folder, or run once with a network"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as plain values. Raises UsageError when it is missing or not JSON."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder} has no config.json; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values
