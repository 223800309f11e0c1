"""Headers of safetensors files: which tensors a file holds, and whether they are the expected ones. No weight is read."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError, reason

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = ("F32", "BF16", "F16", "F64")
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class Part:
    """A tensor that is a part of a stored one, or a stored one under another name.

    index: on the first axis, None for all of it. transposed: whether rows are columns there. half: 0 or 1 where it is one of two
    that are stored beside each other by rows, interleaved: row by row in turn.
    """

    name: str
    index: int | None = None
    transposed: bool = False
    half: int | None = None
    interleaved: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape, from that of the stored tensor: of expert 3's gate, stored [8, 64, 256] and transposed, [128, 64]."""
        shape = stored if self.index is None else stored[1:]
        shape = shape[::-1] if self.transposed else shape
        return shape if self.half is None or not shape else (shape[0] // 2, *shape[1:])

    def of(self, stored: "Tensor") -> "Tensor":
        """A view of the stored tensor; of one index where that was taken already."""
        found = stored.mT if self.transposed and stored.dim() > 1 else stored
        if self.half is None:
            return found
        middle = len(found) // 2
        return found[self.half :: 2] if self.interleaved else found[self.half * middle : (self.half + 1) * middle]


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: shard file, safetensors dtype name, shape. part: None for what is stored whole, by its own name.

    begin: of its data in the file, in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    part: Part | None = None
    begin: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        size = _DTYPES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header; a name that is there twice has two meanings."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _entry(path: Path, item: Any) -> tuple[TensorEntry, int, int]:
    """A tensor of a header, and where its data begin and end. Raises ValueError or TypeError for what describes none."""
    dtype, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
    whole = isinstance(dtype, str) and isinstance(shape, list)
    if not whole or any(type(number) is not int or not 0 <= number < 1 << 63 for number in (*shape, begin, end)):
        raise ValueError
    entry = TensorEntry(path, dtype, tuple(shape))
    if dtype in _DTYPES and end - begin != entry.nbytes:
        raise ValueError
    return entry, begin, end


def read_header(path: Path, remedy: str | None = None) -> dict[str, TensorEntry]:
    """Tensor entries of one safetensors file, from its header alone; no weight is read.

    remedy: what mends a damaged one, for messages; by default it is downloaded again. Raises UsageError when the file is missing,
    truncated or not safetensors: tensors that overlap, leave gaps, are there twice or are longer or shorter than their shapes.
    """
    again = remedy or f"download {path.name} again"
    files.check_regular(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise UsageError(f"{path} is not a complete safetensors file ({size} bytes); {again}")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        found = {name: _entry(path, item) for name, item in header.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise UsageError(f"{path} is missing; {again}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path} has a corrupt safetensors header; {again}") from None
    expected = 0
    for begin, end in sorted((begin, end) for _, begin, end in found.values()):
        if begin != expected:
            raise UsageError(f"{path} has a corrupt safetensors header: tensors overlap or leave a gap at {begin}; {again}")
        expected = end
    if 8 + length + expected != size:
        raise UsageError(f"{path} is truncated or padded: expected {8 + length + expected} bytes, got {size}; {again}")
    unknown = sorted({entry.dtype for entry, _, _ in found.values()} - set(_DTYPES))
    if unknown:
        raise UsageError(f"{path} holds tensors of dtype {', '.join(unknown)[:80]}; expected float32, bfloat16 or float16")
    try:
        with safe_open(path, framework="np"):  # it has rules of its own for texts and metadata
            return {name: replace(entry, begin=8 + length + begin) for name, (entry, begin, _) in found.items()}
    except SafetensorError as error:
        raise UsageError(f"{path} has a corrupt safetensors header: {reason(error)}; {again}") from None


def mismatch(entries: dict[str, TensorEntry], shapes: dict[str, tuple[int, ...]], optional: set[str]) -> str | None:
    """The first way in which stored tensors are not those of a configuration, None where there is none.

    shapes: by name, of all tensors that have to be there. optional: names that may be there beside them. What transformers does
    about any of these is to go on: with random values, without the tensor, or with others' bits.
    """
    missing = [name for name in shapes if name not in entries]
    if missing:
        return f"lacks {len(missing)} tensors, first {missing[0]}"
    # Old checkpoints hold the frequencies of rotary embeddings, which are computed.
    extra = [name for name in entries if name not in shapes and name not in optional and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        return f"holds {len(extra)} tensors that config.json does not name, first {extra[0][:200]}"
    for name, shape in shapes.items():
        if entries[name].shape != shape:
            return f"{name} has shape {list(entries[name].shape)}, config.json says {list(shape)}"
        if entries[name].dtype not in _FLOATS:
            return f"{name} is {entries[name].dtype}; expected float32, bfloat16 or float16"
    return None
