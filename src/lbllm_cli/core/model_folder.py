"""A model folder on disk: where it is, its configuration, and which tensors its safetensors files hold. No weight is read."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError, reason
from lbllm_cli.core.headers import TensorEntry, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_METADATA_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template*",
    "additional_chat_templates/*.jinja", "tokenization_*.py", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


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
    """Everything beside the weights that a copy of the model needs: configs, tokenizer, its code, chat templates, licence."""
    found = {path for pattern in _METADATA_FILES for path in folder.glob(pattern) if path.is_file()}
    yield from sorted(found)


def copy_metadata(folder: Path, target: Path) -> None:
    """Copies tokenizer, generation config, chat template and licence byte for byte; config.json is left to the caller.

    Saving them again through transformers changes tokenizer_class and fails on older generation configs.
    """
    for path in metadata_files(folder):
        if path.name != "config.json":
            place = target / path.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)


def metadata_hash(folder: Path) -> str:
    """Of everything that `copy_metadata` copies, by name and bytes."""
    digest = hashlib.sha256()
    for path in metadata_files(folder):
        if path.name != "config.json":
            digest.update(f"{path.relative_to(folder).as_posix()} {files.sha256(path)}\n".encode())
    return digest.hexdigest()


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
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

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
    except Exception as error:  # a connection that breaks is the HTTP library's own error, or that of its transfer protocol
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
        # The folder of a run has its export in it.
        inner = [place.parent for place in folder.glob("*/config.json")]
        hint = f", as {min(inner, key=lambda place: (place.name != 'export', place))} is" if inner else ""
        raise UsageError(f"{folder} has no config.json; expected a Hugging Face model folder{hint}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def code_hint(values: Any, trust_remote_code: bool) -> str:
    """What to add where a file that may name code of the folder's own cannot be used without it."""
    if trust_remote_code or not isinstance(values, dict) or not values.get("auto_map"):
        return ""
    return "; it names code of its own (auto_map), which runs only with --trust-remote-code or model.trust_remote_code: true"
