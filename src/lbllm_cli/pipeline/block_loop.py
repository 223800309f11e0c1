"""The one loop over decoder blocks, and the hidden states that flow between them.

For every block: teacher outputs on the full-precision stream, fit, write, read back, advance the quantized stream with what
was read back, commit. Streams lie in RAM, or memory-mapped on disk when they would not fit; a run on disk resumes from them,
a run in RAM advances its streams through the committed blocks again, with the same arithmetic.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.errors import RunError, UsageError
from lbllm_cli.format.weights import decode
from lbllm_cli.models.model import Block, SourceModel
from lbllm_cli.pipeline.metrics import BlockError
from lbllm_cli.runtime.attachments import attach
from lbllm_cli.runtime.quantizer import ActivationFormat, read_quantizers
from lbllm_cli.training.block_linears import whole_tensors
from lbllm_cli.training.state import TrainingState

if TYPE_CHECKING:
    from lbllm_cli.pipeline.checkpoint import Checkpoint, StageWriter
    from lbllm_cli.pipeline.reporter import Reporter


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
        if device.type == "cuda":
            return tuple(tensor.pin_memory() for tensor in found)
        # A slice of a mapped file is not read before it is copied; rows by number are a copy already.
        return tuple(tensor.clone() if isinstance(rows, slice) else tensor for tensor in found)

    if device.type == "cpu" and all(stream.path is None for stream in streams):
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


@dataclass
class BlockTask:
    """What a stage's fit gets to see of one block.

    teacher: the full-precision block. full, quantized: its inputs on the two streams. targets: the teacher's outputs, filled
    row by row by `run_teacher`. For a stage that goes on from another one the targets are complete, and there are start, the
    parent's tensors of the block, and keeper, where unfinished training is kept.
    """

    index: int
    teacher: Block
    full: HiddenStream
    quantized: HiddenStream
    targets: HiddenStream
    device: torch.device
    batch_size: int
    start: dict[str, Tensor] | None = None
    keeper: TrainingState | None = None
    _filled: set[int] = field(default_factory=set)

    def run_teacher(self, rows: slice) -> None:
        """Teacher outputs of some rows into `targets`."""
        self.targets.data[rows] = self.teacher(self.full.data[rows].to(self.device)).cpu()
        self._filled.update(range(rows.start, rows.stop))

    def finish_targets(self) -> None:
        """Teacher outputs of the rows that the fit did not ask for."""
        for rows in batches(0, self.full.rows, self.batch_size):
            if not self._filled.issuperset(range(rows.start, rows.stop)):
                self.run_teacher(rows)


Fit = Callable[[BlockTask], tuple[dict[str, Tensor], dict[str, Any]]]


def binarized_weights(stored: dict[str, Tensor], model: SourceModel) -> dict[str, Tensor]:
    """Weights of one block of a checkpoint as the model runs with them: binarized linears decoded, others as they are.

    stored: `P.weight`, `P.levels`, `P.scale` per linear. Returns float32 [out, in] under `P.weight`, on the model's device.
    """
    weights = {name: tensor.to(model.device) for name, tensor in whole_tensors(stored).items()}
    for name in stored:
        owner, _, kind = name.rpartition(".")
        if kind == "scale":
            parts = [stored[f"{owner}.{part}"].to(model.device) for part in ("weight", "levels", "scale")]
            weights[f"{owner}.weight"] = decode(parts[0], parts[1], parts[2], model.shapes[f"{owner}.weight"][1])
    return weights


def stored_block(model: SourceModel, index: int, stored: dict[str, Tensor], activations: ActivationFormat | None) -> Block:
    """Block `index` as a checkpoint holds it; activations: how it quantizes them, None for not at all."""
    block = model.block(index, binarized_weights(stored, model))
    if activations is not None:
        quantizers = read_quantizers(block.layer, stored, block.prefix, activations)
        attach(block.layer, {name: quantizer.to(model.device) for name, quantizer in quantizers.items()})
    return block


class BlockLoop:
    """Runs a stage over all blocks of a model, from the last committed one on.

    folder: where streams on disk lie, or None for RAM. parent: the checkpoint that the stage goes on from, if it does; its fits
    then find the targets complete, and the full-precision inputs are gone by then. keeper: for unfinished training. activations:
    how the stage's blocks quantize them.
    """

    def __init__(
        self,
        model: SourceModel,
        writer: "StageWriter",
        batch_size: int,
        folder: Path | None,
        parent: "Checkpoint | None" = None,
        keeper: TrainingState | None = None,
        activations: ActivationFormat | None = None,
    ):
        self.model = model
        self.writer = writer
        self.batch_size = batch_size
        self.folder = folder
        self.parent = parent
        self.keeper = keeper
        self.activations = activations

    def _path(self, name: str, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}_{index:03d}.bin"

    def run(self, tokens: Tensor, fit: Fit, reporter: "Reporter") -> None:
        """tokens: int64 [rows, length], the stage's data.

        Raises RunError naming the block when an output is not finite.
        """
        first = self.writer.blocks_done
        full, quantized, taught = self._restore(tokens, first, reporter)
        for index in range(first, self.model.blocks):
            interrupt.check()
            reporter.begin_block(index)
            teacher = self.model.block(index)
            if self.parent is None:
                targets = full.like(self._path("full", index + 1))
            else:
                targets = full = full if taught else self._teach(index, teacher, full)
                taught = False
            task = BlockTask(index, teacher, full, quantized, targets, self.model.device, self.batch_size)
            if self.parent is not None:
                task.start, task.keeper = self.parent.read_block(index), self.keeper
            tensors, facts = fit(task)
            if self.parent is None:
                task.finish_targets()
            stored = self.writer.write_block(index, tensors)
            student = stored_block(self.model, index, stored, self.activations)
            # In RAM a crash loses the streams anyway, so that outputs may take their inputs' place.
            outputs = quantized if self.folder is None else quantized.like(self._path("quantized", index + 1))
            advance(student, quantized, outputs, self.model.device, self.batch_size)
            error = self._error(index, targets, outputs)
            targets.sync()
            outputs.sync()
            self.writer.commit(index)
            if self.keeper is not None:
                self.keeper.clear()
            if full is not targets:
                full.remove()
            quantized.remove()
            full, quantized = targets, outputs
            facts |= {"error": error.relative, "error_ordinary": error.relative_ordinary}
            reporter.end_block(index, facts)
        full.remove()
        quantized.remove()

    def _teach(self, index: int, teacher: Block, full: HiddenStream) -> HiddenStream:
        """The teacher's outputs; its inputs are deleted, so that one stream less lies on disk while the student is trained."""
        path = self._path("full", index + 1)
        if path is None:
            advance(teacher, full, full, self.model.device, self.batch_size)
            return full
        # Under another name until they are whole: the name is what tells a resumed run that they are.
        targets = full.like(self._path("unfinished_full", index + 1))
        advance(teacher, full, targets, self.model.device, self.batch_size)
        targets.move(path)
        full.remove()
        return targets

    def _error(self, index: int, targets: HiddenStream, outputs: HiddenStream) -> BlockError:
        error = BlockError()
        for rows in batches(0, targets.rows, self.batch_size):
            error.add(*(stream.data[rows].to(self.model.device) for stream in (targets, outputs)))
        if not error.finite:
            raise RunError(f"block {index}: an output holds NaN or infinity; try model.dtype: float32")
        return error

    def _restore(self, tokens: Tensor, first: int, reporter: "Reporter") -> tuple[HiddenStream, HiddenStream, bool]:
        """Both streams as they enter block `first`; whether the first holds the teacher's outputs of that block instead."""
        shape = (*tokens.shape, int(self.model.config.hidden_size))
        paths = [self._path(name, first) for name in ("full", "quantized")]
        taught = self._path("full", first + 1) if self.parent is not None else None
        if taught is not None and taught.exists():
            if paths[0] is not None:
                paths[0].unlink(missing_ok=True)
            paths[0] = taught
        if (first or paths[0] == taught) and all(path is not None and path.exists() for path in paths):
            full, quantized = (HiddenStream(shape, self.model.dtype, path, create=False) for path in paths)
            return full, quantized, paths[0] == taught
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
        # Under other names until they are whole: a run that is killed while it derives them must not resume on half of them.
        unfinished = [self._path(f"unfinished_{name}", first) for name in ("full", "quantized")]
        full, quantized = (embed_stream(self.model, tokens, path, self.batch_size) for path in unfinished)
        for index in range(first):
            reporter.note(f"advancing the streams through finished block {index + 1} of {first}")
            student = stored_block(self.model, index, self.writer.read_block(index), self.activations)
            advance(self.model.block(index), full, full, self.model.device, self.batch_size)
            advance(student, quantized, quantized, self.model.device, self.batch_size)
        for stream, path in zip((full, quantized), (self._path("full", first), self._path("quantized", first)), strict=True):
            stream.move(path)
        return full, quantized, False
