"""Passes over the calibration text that sum up the moments of what a block's linears read."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lbllm_cli.core import interrupt
from lbllm_cli.core.splits import held_out_rows
from lbllm_cli.models.block import Block
from lbllm_cli.pipeline.block_loop import BlockTask
from lbllm_cli.pipeline.streams import HiddenStream, Sink, fetched, sink
from lbllm_cli.ptq.moments import InputMoments
from lbllm_cli.ptq.passes import Pass, is_down
from lbllm_cli.ptq.routed import StopForward, add_routed, down_inputs, sent_in, shrunk
from lbllm_cli.ptq.teams import Team, counted
from lbllm_cli.recipe.schema import Ptq
from lbllm_cli.runtime.experts import expert_of
from lbllm_cli.runtime.units import Unit

# The projection of the heads' outputs, a unit of its own in every attention.
_OUTPUT = ("self_attn.o_proj",)


@contextmanager
def _inputs_of(block: Block, names: list[str], stop: bool) -> Iterator[dict[str, Tensor]]:
    """Collects what the named linears read in each forward pass; `stop` ends a pass at the last of them."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[name] = inputs[0]
        if stop and name == names[-1]:
            raise StopForward

    handles = [block.linear(name).register_forward_pre_hook(partial(keep, name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _KnownAttention(nn.Module):
    """Stands for a block's attention once its heads' outputs are known: only the output projection is left to compute."""

    def __init__(self, projection: nn.Linear):
        super().__init__()
        self.projection = projection
        self.heads: Tensor | None = None

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
        assert self.heads is not None
        return self.projection(self.heads), None


@dataclass
class Moments:
    """Of one unit: estimated on most sequences, and on those held out to choose the target's strength, if any are.

    routed: of an expert, how many tokens it got, and how much of its mean counts beside that of all tokens.
    """

    fitted: InputMoments
    held_out: InputMoments | None
    routed: tuple[int, float] | None = None

    @property
    def tokens(self) -> int:
        """How many were summed."""
        return self.fitted.tokens + (self.held_out.tokens if self.held_out is not None else 0)


def held_out(settings: Ptq, rows: int) -> int:
    """Of `rows` sequences, how many choose the strength of the target; they are the last ones."""
    return held_out_rows(rows, settings.held_out) if settings.asymmetric == "auto" else 0


class Collector:
    """Runs both streams through a block and sums the moments of what its linears read.

    In sequential order every unit needs a pass. What o_proj reads does not change after it was collected, so later passes
    start there: attention then runs 24 times instead of 56 for a block of eight batches. Kept only while the streams are in
    memory as well.
    """

    def __init__(self, task: BlockTask, student: Block, settings: Ptq):
        self.task = task
        self.student = student
        self.asymmetric = settings.asymmetric != 0
        self.held = held_out(settings, task.share.rows)
        self.parts = task.share.parted(self.held)
        self.keep = settings.sequential and task.quantized.path is None
        # What o_proj reads in the student, and in the teacher.
        self.known: dict[Block, HiddenStream] = {}
        # Of all experts together, by what their linears read: whether it is their inner state.
        self.common: dict[bool, Moments] = {}

    def collect(self, teams: dict[Unit, Team], last: bool) -> dict[Unit, Moments]:
        """Moments of some units' inputs over the sequences of all ranks, from one pass; of those that this rank fits.

        teams: who fits which unit. last: of the block's passes, which lets the teacher run on to its end: its outputs are the
        targets.
        """
        units: Pass = tuple(teams)
        moments = {unit: self._empty(unit) for unit in units}
        routed = [unit for unit in units if expert_of(unit[0]) is not None]
        plain = [unit[0] for unit in units if expert_of(unit[0]) is None]
        inner = any(map(is_down, routed))
        new = {is_down(unit): self._empty(unit) for unit in routed if is_down(unit) not in self.common}
        heads = self._heads(self.student.linear(plain[0]).in_features) if self.keep and units == (_OUTPUT,) else {}
        with ExitStack() as stack:
            attention = stack.enter_context(self._attention())
            names = plain + (down_inputs(self.student) if inner else [])
            read = stack.enter_context(_inputs_of(self.student, names, stop=not routed))
            wanted = stack.enter_context(_inputs_of(self.task.teacher, plain, stop=not last and not routed))
            # The student's experts compute what their own last linears read, and nothing behind them is asked for.
            sent = stack.enter_context(sent_in(self.student, "after" if inner else "before")) if routed else []
            full_sent = stack.enter_context(sent_in(self.task.teacher, None if last else "before")) if routed else []
            targets = stack.enter_context(sink(self.task.targets, self.task.device)) if self.asymmetric and last else None
            keeping = {block: stack.enter_context(sink(stream, self.task.device)) for block, stream in heads.items()}
            for rows, hidden, full, known in self._pieces(list(attention)):
                for stub, state in zip(attention.values(), known, strict=True):
                    stub.heads = state
                read.clear()
                self._pass(rows, hidden, full, targets)
                for unit, found in moments.items():
                    if unit not in routed:
                        self._part(found, rows).add(read[unit[0]], wanted.get(unit[0]))
                if routed:
                    both = sent[0], full_sent[0] if self.asymmetric else None
                    own = {unit: self._part(moments[unit], rows) for unit in routed}
                    common = {kind: self._part(found, rows) for kind, found in new.items()}
                    add_routed((self.student, self.task.teacher), read, both, own, common)
                for block, out in keeping.items():
                    out.put(rows, (read if block is self.student else wanted)[_OUTPUT[0]])
        self.known |= heads
        self._pool(teams, moments, new)
        self.common |= new
        return {unit: self._shrunk(unit, found) for unit, found in moments.items() if teams[unit].fits}

    def _pool(self, teams: dict[Unit, Team], moments: dict[Unit, Moments], new: dict[bool, Moments]) -> None:
        """Adds up what the ranks have collected. new: of all experts together, which every rank needs."""
        group = self.task.group
        every = [(teams[unit], found) for unit, found in moments.items()] + [(Team(group), found) for found in new.values()]
        parts = [(team, part) for team, found in every for part in (found.fitted, found.held_out) if part is not None]
        counted(group, [part for _, part in parts])
        for team, part in parts:
            team.pool(part)

    def _empty(self, unit: Unit) -> Moments:
        size = self.student.linear(unit[0]).in_features
        fitted = InputMoments.empty(size, self.task.device, self.asymmetric)
        return Moments(fitted, InputMoments.empty(size, self.task.device, True) if self.held else None)

    def _part(self, moments: Moments, rows: slice) -> InputMoments:
        """Those of fitted or of held-out sequences."""
        return moments.fitted if rows.start < self.parts[0][1] or moments.held_out is None else moments.held_out

    def _shrunk(self, unit: Unit, found: Moments) -> Moments:
        """Moments of an expert that too few tokens reach are drawn towards those of all."""
        if expert_of(unit[0]) is None:
            return found
        share, common = min(1.0, found.tokens / self.student.linear(unit[0]).in_features), self.common[is_down(unit)]
        if share == 1:
            return replace(found, routed=(found.tokens, 1.0))
        held = shrunk(found.held_out, common.held_out, share) if found.held_out is not None and common.held_out else None
        return Moments(shrunk(found.fitted, common.fitted, share), held, (found.tokens, share))

    def _pieces(self, attention: list[Block]) -> Iterator[tuple[slice, Tensor, Tensor | None, tuple[Tensor, ...]]]:
        """Rows, their quantized and full-precision inputs, and what is known of their heads in some blocks."""
        task = self.task
        pieces = task.pieces
        streams = [task.quantized, *([task.full] if self.asymmetric else []), *(self.known[block] for block in attention)]
        for rows, (hidden, *others) in zip(pieces, fetched(tuple(streams), pieces, task.device), strict=True):
            interrupt.check()
            full = others.pop(0) if self.asymmetric else None
            yield rows, hidden, full, tuple(others)

    def _pass(self, rows: slice, hidden: Tensor, full: Tensor | None, targets: Sink | None) -> None:
        with suppress(StopForward):
            if targets is not None and full is not None:
                self.task.run_teacher(rows, full, targets)
            elif full is not None:
                self.task.teacher(full)
        with suppress(StopForward):
            self.student(hidden)

    def _heads(self, width: int) -> dict[Block, HiddenStream]:
        """Streams for what o_proj reads, beside those of the hidden states."""
        given, blocks = self.task.quantized, [self.student, *([self.task.teacher] if self.asymmetric else [])]
        shape = (given.shape[0], given.shape[1], width)
        return {block: HiddenStream(shape, given.dtype, device=given.device) for block in blocks}

    @contextmanager
    def _attention(self) -> Iterator[dict[Block, _KnownAttention]]:
        """Puts the stand-in where heads are known, and takes it out again."""
        layers: dict[Block, Any] = {block: block.layer for block in self.known}
        real = {block: layer.self_attn for block, layer in layers.items()}
        stubs = {block: _KnownAttention(block.linear(_OUTPUT[0])) for block in layers}
        for block, layer in layers.items():
            layer.self_attn = stubs[block]
        try:
            yield stubs
        finally:
            for block, layer in layers.items():
                layer.self_attn = real[block]
