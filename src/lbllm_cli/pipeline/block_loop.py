"""The one loop over decoder blocks.

For every block: teacher outputs on the full-precision stream, fit, write, read back, advance the quantized stream with what
was read back, commit. A run whose streams lie on disk resumes from them, a run in RAM advances its streams through the committed
blocks again, with the same arithmetic.
"""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lbllm_cli.core import interrupt
from lbllm_cli.core.errors import RunError
from lbllm_cli.core.splits import spread_rows
from lbllm_cli.models.block import Block
from lbllm_cli.models.stored import stored_block
from lbllm_cli.parallel.group import Group, stacked
from lbllm_cli.parallel.shares import Share
from lbllm_cli.pipeline.interfaces import Monitor, StateKeeper
from lbllm_cli.pipeline.metrics import BlockError
from lbllm_cli.pipeline.streams import HiddenStream, Sink, advance, batches, embed_stream, fetched, row_slices, sink
from lbllm_cli.pipeline.training_state import TrainingState

if TYPE_CHECKING:
    from lbllm_cli.pipeline.work import StageRun


@dataclass
class BlockTask:
    """What a stage's fit gets to see of one block.

    teacher: the full-precision block. quantized: its inputs as the blocks before it give them. targets: the teacher's outputs.
    start: the parent's tensors of the block, none where a stage starts from the source model: then `targets` is filled row by row
    by `run_teacher` out of `full`, the full-precision inputs. Otherwise the targets are complete, and `full` is the same stream.
    pieces: rows that pass through a block at once; in others last bits differ, and a resumed run has to give the same ones.
    keeper: for unfinished training. monitor: told how it goes. group: of ranks that do the block together. share: of the stage's
    sequences, that the streams of this rank hold.
    """

    index: int
    teacher: Block
    full: HiddenStream
    quantized: HiddenStream
    targets: HiddenStream
    device: torch.device
    pieces: list[slice]
    start: dict[str, Tensor]
    keeper: StateKeeper
    monitor: Monitor
    group: Group
    share: Share
    _filled: set[int] = field(default_factory=set)

    def sample(self, stream: HiddenStream, count: int) -> Tensor:
        """Some of all ranks' sequences of a stream, spread over them: [n, length, hidden] on the device, the same everywhere."""
        rows = self.share.rows
        taken = spread_rows(rows, min(count, rows))
        ((own,),) = fetched((stream,), [torch.tensor(self.share.own(taken), dtype=torch.long)], self.device)
        return stacked(self.group, {"": own})[""]

    def run_teacher(self, rows: slice, hidden: Tensor, out: Sink) -> None:
        """Teacher outputs of some rows into `targets`. hidden: their full-precision inputs. out: of `targets`."""
        out.put(rows, self.teacher(hidden))
        self._filled.update(range(rows.start, rows.stop))

    def finish_targets(self) -> None:
        """Teacher outputs of the rows that the fit did not ask for, where targets were not complete from the start."""
        if self.targets is self.full:
            return
        pieces = [rows for rows in self.pieces if not self._filled.issuperset(range(rows.start, rows.stop))]
        with sink(self.targets, self.device) as out:
            for rows, (hidden,) in zip(pieces, fetched((self.full,), pieces, self.device), strict=True):
                interrupt.check()
                self.run_teacher(rows, hidden, out)


@dataclass(frozen=True)
class BlockResult:
    """What a fit gives. tensors: of the block, under full names. facts: for its record in events.jsonl."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


Fit = Callable[[BlockTask], BlockResult]


class BlockLoop:
    """Runs a stage over all blocks of a model, from the last committed one on.

    A stage that goes on from another one finds the targets complete, and the full-precision inputs are gone by then. held_out:
    of the sequences, how many of the last ones a fit looks at apart.
    """

    def __init__(self, run: "StageRun", held_out: int = 0):
        self.stage, self.model, self.writer, self.group = run, run.plan.model, run.writer, run.plan.group
        self.share = self.group.share(len(run.tokens))
        self.batch_size = run.plan.recipe.runtime.batch_size
        self.pieces = [rows for part in self.share.parted(held_out) for rows in batches(*part, self.batch_size)]
        self._files = run.writer.path / "streams"
        self.folder = self._files if run.need.place == "disk" else None
        self.place = self.model.device if run.need.place == "device" else None
        self._spare: list[HiddenStream] = []
        self.keeper = TrainingState(run.writer.path, run.plan.recipe.runtime.save_minutes, self.group)
        self._tail = ".bin" if self.group.size == 1 else f".rank{self.group.rank:03d}.bin"

    def _path(self, name: str, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}_{index:03d}{self._tail}"

    def run(self, fit: Fit) -> None:
        """Fits, writes and commits block after block. Raises RunError naming the block when an output is not finite."""
        model, writer, reporter, parent = self.model, self.writer, self.stage.reporter, self.stage.parent
        first = writer.blocks_done
        if first == model.blocks:
            # Stopped behind its last block: there is nobody to derive streams for.
            self._clear(set())
            return
        full, quantized, taught = self._restore(first)
        teacher: Block | None = None
        for index in range(first, model.blocks):
            interrupt.check()
            reporter.begin_block(index)
            teacher = model.block(index) if teacher is None else teacher
            if parent is None:
                targets, start = self._room(full, self._path("full", index + 1)), {}
            else:
                targets = full = full if taught else self._teach(index, teacher, full)
                start = parent.read_block(index)
            task = BlockTask(
                index, teacher, full, quantized, targets, model.device, self.pieces, start, self.keeper, reporter, self.group,
                self.share,
            )  # fmt: skip
            result = fit(task)
            task.finish_targets()
            stored = writer.write_block(index, result.tensors)
            student = stored_block(model, index, stored, self.stage.activations)
            # Its memory is the next one's.
            del task, start
            teacher = model.block(index + 1) if parent is not None and index + 1 < model.blocks else None
            ahead = None if teacher is None else self._unfinished(targets, index + 2)
            outputs, error = self._leave(index, student, quantized, targets, teacher, ahead)
            # Before it is committed: a run that is killed in between makes the block again, and of two records the last counts.
            reporter.end_block(index, result.facts | {"error": error.relative, "error_ordinary": error.relative_ordinary})
            writer.commit(index)
            self.keeper.clear()
            # Of a stage in memory the outputs are where their inputs were.
            for stream in (full, quantized):
                if stream is not targets and stream is not outputs:
                    self._spare.append(stream)
            full, quantized, taught = targets, outputs, ahead is not None
            if ahead is not None:
                full = self._finished(targets, ahead, index + 2)
        for stream in (full, quantized, *self._spare):
            stream.remove()

    def _room(self, like: HiddenStream, path: Path | None) -> HiddenStream:
        """A stream to be written, in the place of one that is no longer read where there is one.

        New memory is handed out page by page, in a file's cache too: 4 KiB at a time, at 0.3 to 0.9 GB/s on a small machine where
        memory that is there already takes 3.
        """
        if not self._spare:
            return like.like(path)
        found = self._spare.pop()
        found.move(path)
        return found

    def _teach(self, index: int, teacher: Block, full: HiddenStream) -> HiddenStream:
        """The teacher's outputs; on disk its inputs are deleted."""
        targets = self._unfinished(full, index + 1)
        advance(teacher, full, targets, self.model.device, self.batch_size)
        return self._finished(full, targets, index + 1)

    def _unfinished(self, inputs: HiddenStream, index: int) -> HiddenStream:
        """Where the teacher's outputs that enter block `index` go."""
        # In memory a crash loses streams anyway, so that outputs may take their inputs' place. On disk they go under
        # another name until they are whole: the name is what tells a resumed run that they are.
        path = self._path("unfinished_full", index)
        return inputs if path is None else self._room(inputs, path)

    def _finished(self, inputs: HiddenStream, outputs: HiddenStream, index: int) -> HiddenStream:
        """The teacher's outputs, which are whole now."""
        if outputs is not inputs:
            outputs.move(self._path("full", index))
            self._spare.append(inputs)
        return outputs

    def _leave(
        self,
        index: int,
        student: Block,
        quantized: HiddenStream,
        targets: HiddenStream,
        teacher: Block | None,
        ahead: HiddenStream | None,
    ) -> tuple[HiddenStream, BlockError]:
        """Runs the student over its inputs: its outputs, and their error beside the targets.

        teacher: the next block's, which turns the targets into `ahead` in the same pass: they are read once. Raises RunError
        where an output is not finite.
        """
        # Half of it must not be under the name that a resumed run looks for, whichever places its streams had in between.
        outputs = quantized if self.folder is None else self._room(quantized, self._path("unfinished_quantized", index + 1))
        device, error = self.model.device, BlockError()
        pieces = row_slices(quantized.rows, self.batch_size)
        with ExitStack() as sinks:
            out = sinks.enter_context(sink(outputs, device))
            taught = None if ahead is None else sinks.enter_context(sink(ahead, device))
            for rows, (hidden, wanted) in zip(pieces, fetched((quantized, targets), pieces, device), strict=True):
                interrupt.check()
                found = student(hidden)
                error.add(wanted, found)
                out.put(rows, found)
                if taught is not None and teacher is not None:
                    taught.put(rows, teacher(wanted))
        error.pool(self.group)
        if not error.finite:
            raise RunError(f"block {index}: an output holds NaN or infinity; try model.dtype: float32")
        targets.sync()
        if outputs is not quantized:
            outputs.move(self._path("quantized", index + 1))
        return outputs, error

    def _restore(self, first: int) -> tuple[HiddenStream, HiddenStream, bool]:
        """Both streams as they enter block `first`; whether the first holds the teacher's outputs of that block instead."""
        tokens, reporter = self.stage.tokens[self.share.slice], self.stage.reporter
        shape = (*tokens.shape, int(self.model.config.hidden_size))
        paths = [self._path(name, first) for name in ("full", "quantized")]
        taught = self._path("full", first + 1) if self.stage.parent is not None else None
        if taught is not None and taught.exists():
            if paths[0] is not None:
                paths[0].unlink(missing_ok=True)
            paths[0] = taught
        if (first or paths[0] == taught) and all(path is not None and path.exists() for path in paths):
            full, quantized = (HiddenStream(shape, self.model.dtype, path, create=False) for path in paths)
            self._clear({full.path, quantized.path})
            return full, quantized, paths[0] == taught
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
        # In memory too: what an attempt on disk left is of blocks that this one commits anew, and no later one may go on from it.
        self._clear(set())
        # Under other names until they are whole: a run that is killed while it derives them must not resume on half of them.
        unfinished = [self._path(f"unfinished_{name}", first) for name in ("full", "quantized")]
        full, quantized = (embed_stream(self.model, tokens, path, self.batch_size, self.place) for path in unfinished)
        for index in range(first):
            reporter.note(f"advancing the streams through finished block {index + 1} of {first}")
            student = stored_block(self.model, index, self.writer.read_block(index), self.stage.activations)
            advance(self.model.block(index), full, full, self.model.device, self.batch_size, pieces=self.pieces)
            advance(student, quantized, quantized, self.model.device, self.batch_size)
        for stream, path in zip((full, quantized), (self._path("full", first), self._path("quantized", first)), strict=True):
            stream.move(path)
        return full, quantized, False

    def _clear(self, used: Collection[Path | None]) -> None:
        """Deletes streams of the run before that nobody goes on from."""
        own = {path for path in self._files.glob("*.bin") if path.name.partition(".")[2] == self._tail[1:]}
        for path in own - set(used):
            path.unlink()
