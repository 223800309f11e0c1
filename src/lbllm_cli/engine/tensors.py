"""Stored tensors of a packed export as arrays over the mapped file."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbllm_cli.core.model_folder import read_folder
from lbllm_cli.engine.config import Unfit
from lbllm_cli.format.names import ROW_SCALE

# numpy has no bfloat16: its bits.
_DTYPES = {"U8": np.uint8, "I8": np.int8, "I32": np.int32, "F16": np.float16, "F32": np.float32, "BF16": np.uint16}
_FLOATS = ("F32", "BF16", "F16")
# Values that are looked at together.
_PIECE = 1 << 20


class Tensors:
    """The tensors of a folder. Each is mapped by itself: what nobody holds any more is not resident either.

    Raises UsageError for damaged files.
    """

    def __init__(self, folder: Path):
        self.entries = read_folder(folder)
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def array(self, name: str, dtype: str, *shape: int) -> NDArray[Any]:
        """A tensor of this dtype and shape. Raises Unfit where there is none."""
        entry = self.entries.get(name)
        self._read.add(name)
        if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
            got = "nothing" if entry is None else f"{entry.dtype} {entry.shape}"
            raise Unfit(f"{name}: expected {dtype} {shape}, got {got}")
        if not entry.nbytes:
            return np.empty(shape, _DTYPES[dtype])
        return np.memmap(entry.file, _DTYPES[dtype], "r", entry.begin, shape)

    def check_all_read(self) -> None:
        """Raises Unfit naming a tensor that nobody has asked for: a model that is made of it computes something else."""
        # Old checkpoints hold the frequencies of rotary embeddings, which are computed.
        left = [name for name in self.entries if name not in self._read and not name.endswith("rotary_emb.inv_freq")]
        if left:
            raise Unfit(f"{left[0]} is none of the tensors that the library reads")

    def floats(self, name: str, *shape: int) -> tuple[NDArray[Any], str]:
        """A tensor of floats that are finite, as it is stored: float32, or the bits of bfloat16; and which of them, F32 or BF16.

        float16 becomes float32, which the library reads. Raises Unfit.
        """
        dtype = self.entries[name].dtype if name in self.entries else "F32"
        if dtype not in _FLOATS:
            raise Unfit(f"{name}: expected {', '.join(_FLOATS)}, got {dtype}")
        stored = self.array(name, dtype, *shape)
        flat = stored.reshape(-1)
        for start in range(0, len(flat), _PIECE):
            piece = flat[start : start + _PIECE]
            good = (piece & 0x7F80) != 0x7F80 if dtype == "BF16" else np.isfinite(piece)
            if not good.all():
                raise Unfit(f"{name} holds NaN or infinity")
        return (stored.astype(np.float32), "F32") if dtype == "F16" else (stored, dtype)

    def rows(self, owner: str, count: int, width: int) -> tuple[NDArray[Any], str, NDArray[np.float16] | None]:
        """An embedding or a head: weight and dtype as `floats`, None; or int8 [count, width], I8, and a scale for each row."""
        entry = self.entries.get(f"{owner}.weight")
        if entry is None or entry.dtype != "I8":
            return *self.floats(f"{owner}.weight", count, width), None
        scale = self.array(f"{owner}.{ROW_SCALE}", "F16", count)
        if not np.isfinite(scale).all():
            raise Unfit(f"{owner}.{ROW_SCALE} holds NaN or infinity")
        return self.array(f"{owner}.weight", "I8", count, width), "I8", scale

    def small_floats(self, name: str, *shape: int) -> NDArray[np.float32]:
        """The same as float32 in memory, for norms and biases."""
        stored, dtype = self.floats(name, *shape)
        return (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else np.array(stored, np.float32)
