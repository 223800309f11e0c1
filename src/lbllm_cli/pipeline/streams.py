"""Hidden states between decoder blocks: on the device where they fit, in RAM, or on disk when they would not fit there."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.errors import UsageError
from lbllm_cli.models.block import Block
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.metrics import BlockError
from lbllm_cli.runtime.backend import backend_of

Rows = slice | Tensor
# Pieces that are read before they are asked for.
_AHEAD = 2
# Pieces on their way to a stream before the next waits.
_BEHIND = 3


class HiddenStream:
    """Hidden states [rows, length, hidden] between two blocks.

    path: of a file that holds them, None for memory. create: False for a file that is whole. device: whose memory holds them
    otherwise, None for RAM. A file is read and written by plain calls: a mapped one is filled page by page, at 0.9 GB/s where
    `pwrite` reaches 3.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        path: Path | None = None,
        create: bool = True,
        device: torch.device | None = None,
    ):
        self.shape, self.dtype, self.path, self.device = shape, dtype, path, device
        self._row = shape[1] * shape[2] * dtype.itemsize
        self.data: Tensor | None = None
        if path is None:
            self.data = torch.empty(shape, dtype=dtype, device=device)
            return
        size = shape[0] * self._row
        if create:
            with files.naming(path), path.open("wb") as handle:
                # Reserves the blocks now: a full disk is met here, not in the middle of a block.
                # A rank whose share is empty has none to reserve, which the call refuses.
                if size:
                    os.posix_fallocate(handle.fileno(), 0, size)
        elif path.stat().st_size != size:
            # Of a shorter file the end would be missing.
            got = f"expected {size} bytes, got {path.stat().st_size}"
            raise UsageError(f"{path} is damaged ({got}); delete {path.parent} and run the same command again to resume")
        self._file = path.open("r+b", buffering=0)

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.shape[0]

    def like(self, path: Path | None) -> "HiddenStream":
        """An empty stream of the same shape, in the same place."""
        return HiddenStream(self.shape, self.dtype, path, device=self.device)

    def read(self, rows: Rows, to: Tensor) -> Tensor:
        """Copies rows into `to`, [n, length, hidden] in RAM; returns it."""
        if self.data is not None:
            return to.copy_(self.data[rows]) if isinstance(rows, slice) else torch.index_select(self.data, 0, rows, out=to)
        memory = _bytes(to)
        runs = [(rows.start, memory)] if isinstance(rows, slice) else zip(rows.tolist(), _bytes_of_rows(to), strict=True)
        for first, part in runs:
            self._all(os.preadv, first, part)
        return to

    def write(self, rows: slice, values: Tensor) -> None:
        """Replaces rows; values: [n, length, hidden]."""
        if self.data is not None:
            self.data[rows] = values
            return
        self._all(os.pwritev, rows.start, _bytes(values.cpu().contiguous()))

    def _all(self, call: "_Transfer", row: int, memory: memoryview) -> None:
        """One call moves 2 GiB at most."""
        assert self.path is not None
        offset, done = row * self._row, 0
        with files.naming(self.path):
            while done < len(memory):
                moved = call(self._file.fileno(), [memory[done:]], offset + done)
                if not moved:
                    where = f"{self.path} ends at {offset + done} bytes"
                    raise UsageError(f"{where}; delete {self.path.parent} and run the command again")
                done += moved

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
            self._file.close()


class _Transfer(Protocol):
    def __call__(self, file: int, buffers: list[memoryview], offset: int, /) -> int: ...


def _bytes(tensor: Tensor) -> memoryview:
    values: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(values)


def _bytes_of_rows(tensor: Tensor) -> list[memoryview]:
    return [_bytes(row) for row in tensor]


def batches(start: int, end: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows; a signal stops here."""
    for first in range(start, end, size):
        interrupt.check()
        yield slice(first, min(first + size, end))


def _count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def fetched(streams: tuple[HiddenStream, ...], pieces: Sequence[Rows], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Rows of several streams on the device, piece by piece; from elsewhere, the next are read while one is worked on.

    pieces: slices, or row numbers int64 [n]. Yields tensors [n, length, hidden], one per stream.
    """
    backend = backend_of(device)
    transfers = backend.transfers(device)

    def here(stream: HiddenStream) -> bool:
        return stream.data is not None and (stream.device is not None or backend.shares_ram)

    def load(rows: Rows) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for stream in streams:
            shape = (_count(rows), *stream.shape[1:])
            if here(stream):
                found.append(None)
            elif transfers is None:
                found.append(stream.read(rows, torch.empty(shape, dtype=stream.dtype)))
            else:
                found.append(stream.read(rows, transfers.buffer(shape, stream.dtype)))
        return found

    def placed(stream: HiddenStream, loaded: Tensor | None, rows: Rows) -> Tensor:
        if loaded is not None:
            return loaded if transfers is None else transfers.upload(loaded)
        assert stream.data is not None
        if isinstance(rows, slice) or transfers is None:
            return stream.data[rows]
        return stream.data.index_select(0, transfers.small(rows))

    if all(map(here, streams)):
        for rows in pieces:
            yield tuple(placed(stream, None, rows) for stream in streams)
        return
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = [reader.submit(load, rows) for rows in pieces[:_AHEAD]]
        for index, rows in enumerate(pieces):
            current = ahead.pop(0).result()
            found = tuple(placed(stream, loaded, rows) for stream, loaded in zip(streams, current, strict=True))
            ahead += [reader.submit(load, later) for later in pieces[index + _AHEAD : index + _AHEAD + 1]]
            yield found


class Sink:
    """Where results of a pass go: into a stream, behind the back of whoever computes them."""

    def __init__(self, stream: HiddenStream, device: torch.device, writer: ThreadPoolExecutor):
        self.stream, self.writer = stream, writer
        # In the same memory there is nothing to wait for.
        self.transfers = None if stream.device is not None else backend_of(device).transfers(device)
        self.pending: list[Future[None]] = []

    def put(self, rows: slice, values: Tensor) -> None:
        """Rows of the stream: [n, length, hidden] on the device."""
        if self.transfers is None:
            self.stream.write(rows, values)
            return
        while len(self.pending) >= _BEHIND:
            self.pending.pop(0).result()
        landing, transfers = self.transfers.download(values), self.transfers

        def land() -> None:
            self.stream.write(rows, landing.wait())
            transfers.release(landing.values)

        self.pending.append(self.writer.submit(land))


@contextmanager
def sink(stream: HiddenStream, device: torch.device) -> Iterator[Sink]:
    """A sink; at the end everything that was put into it is in the stream."""
    with ThreadPoolExecutor(max_workers=1) as writer:
        found = Sink(stream, device, writer)
        yield found
        for pending in found.pending:
            pending.result()


def row_slices(rows: int, size: int) -> list[slice]:
    """Slices of at most `size` rows: 5, 2 -> 0:2, 2:4, 4:5."""
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def embed_stream(
    model: SourceModel, tokens: Tensor, path: Path | None, batch_size: int, device: torch.device | None = None
) -> HiddenStream:
    """First inputs: token embeddings of tokens int64 [rows, length]. path, device: see `HiddenStream`."""
    embedding = model.embed()
    stream = HiddenStream((*tokens.shape, embedding.embedding_dim), model.dtype, path, device=device)
    with sink(stream, model.device) as out:
        for rows in batches(0, tokens.shape[0], batch_size):
            out.put(rows, embedding(tokens[rows].to(model.device)))
    return stream


def advance(
    block: Block,
    inputs: HiddenStream,
    outputs: HiddenStream,
    device: torch.device,
    batch_size: int,
    targets: HiddenStream | None = None,
    pieces: Sequence[slice] | None = None,
) -> BlockError:
    """outputs = block(inputs); the two may be the same stream. Returns their error beside `targets`, where these are given.

    pieces: that the rows pass in, default `row_slices`.
    """
    error = BlockError()
    pieces = row_slices(inputs.rows, batch_size) if pieces is None else pieces
    streams = (inputs,) if targets is None else (inputs, targets)
    with sink(outputs, device) as out:
        for rows, (hidden, *wanted) in zip(pieces, fetched(streams, pieces, device), strict=True):
            interrupt.check()
            found = block(hidden)
            if wanted:
                error.add(wanted[0], found)
            out.put(rows, found)
    return error
