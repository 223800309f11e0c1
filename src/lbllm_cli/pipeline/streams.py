"""Hidden states between decoder blocks, in RAM, or memory-mapped on disk when they would not fit."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.errors import UsageError
from lbllm_cli.models.block import Block
from lbllm_cli.models.model import SourceModel
from lbllm_cli.runtime.backend import backend_of


class HiddenStream:
    """Hidden states [rows, length, hidden] between two blocks, in RAM or in a memory-mapped file."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, path: Path | None = None, create: bool = True):
        self.path = path
        size = shape[0] * shape[1] * shape[2]
        if path is None:
            self.data = torch.empty(shape, dtype=dtype)
            return
        if create:
            with path.open("wb") as handle:
                # Reserves the blocks now: a sparse file would meet a full disk as SIGBUS in the middle of a store.
                os.posix_fallocate(handle.fileno(), 0, size * dtype.itemsize)
        elif path.stat().st_size != size * dtype.itemsize:
            # A shorter file would be filled up with zeros.
            got = f"expected {size * dtype.itemsize} bytes, got {path.stat().st_size}"
            raise UsageError(f"{path} is damaged ({got}); delete {path.parent} and run the same command again to resume")
        self.data = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.data.shape[0]

    def like(self, path: Path | None) -> "HiddenStream":
        """An empty stream of the same shape."""
        rows, length, hidden = self.data.shape
        return HiddenStream((rows, length, hidden), self.data.dtype, path)

    def sync(self) -> None:
        """Puts a stream on disk for good."""
        if self.path is not None:
            files.sync_file(self.path)

    def move(self, path: Path | None) -> None:
        """Renames the file of a stream on disk."""
        if self.path is not None and path is not None:
            self.sync()
            os.replace(self.path, path)
            self.path = path

    def remove(self) -> None:
        """Deletes the file of a stream that is no longer read."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def batches(start: int, end: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows; a signal stops here."""
    for first in range(start, end, size):
        interrupt.check()
        yield slice(first, min(first + size, end))


Rows = slice | Tensor


def fetched(streams: tuple[HiddenStream, ...], pieces: Sequence[Rows], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Rows of several streams on the device, piece by piece; from disk or to a GPU, the next is read while one is worked on.

    pieces: slices, or row numbers int64 [n]. Yields tensors [n, length, hidden], one per stream.
    """

    def load(rows: Rows) -> tuple[Tensor, ...]:
        found = [stream.data[rows] for stream in streams]
        if not backend.shares_ram:
            return tuple(map(backend.staged, found))
        # A slice of a mapped file is not read before it is copied; rows by number are a copy already.
        return tuple(tensor.clone() if isinstance(rows, slice) else tensor for tensor in found)

    backend = backend_of(device)
    if backend.shares_ram and all(stream.path is None for stream in streams):
        for rows in pieces:
            yield tuple(stream.data[rows] for stream in streams)
        return
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(load, pieces[0]) if pieces else None
        for index in range(len(pieces)):
            assert ahead is not None
            current = ahead.result()
            ahead = reader.submit(load, pieces[index + 1]) if index + 1 < len(pieces) else None
            yield tuple(tensor.to(device, non_blocking=True) for tensor in current)


def embed_stream(model: SourceModel, tokens: Tensor, path: Path | None, batch_size: int) -> HiddenStream:
    """First inputs: token embeddings of tokens int64 [rows, length]."""
    embedding = model.embed()
    stream = HiddenStream((*tokens.shape, embedding.embedding_dim), model.dtype, path)
    for rows in batches(0, tokens.shape[0], batch_size):
        stream.data[rows] = embedding(tokens[rows].to(model.device)).cpu()
    return stream


def advance(block: Block, inputs: HiddenStream, outputs: HiddenStream, device: torch.device, batch_size: int) -> None:
    """outputs = block(inputs); the two may be the same stream."""
    pieces = [slice(first, min(first + batch_size, inputs.rows)) for first in range(0, inputs.rows, batch_size)]
    for rows, (hidden,) in zip(pieces, fetched((inputs,), pieces, device), strict=True):
        interrupt.check()
        outputs.data[rows] = block(hidden).cpu()
