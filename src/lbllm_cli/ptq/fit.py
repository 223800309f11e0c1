"""Stage 1: Hessian-weighted EM with error compensation, block by block (LBLLM stage 1; refinement and target are ours)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lbllm_cli.core import interrupt
from lbllm_cli.core.errors import RunError
from lbllm_cli.core.splits import held_out_rows
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.models.block import Block, block_prefix
from lbllm_cli.pipeline.block_loop import BlockResult, BlockTask
from lbllm_cli.pipeline.streams import HiddenStream, Sink, batches, fetched, sink
from lbllm_cli.ptq.compensate import compensate
from lbllm_cli.ptq.em import fit_levels, quantile_levels
from lbllm_cli.ptq.moments import InputMoments, inverse_factor
from lbllm_cli.ptq.refine import descend_codes, output_error, refit_levels
from lbllm_cli.ptq.target import step_length, target_step
from lbllm_cli.recipe.schema import Ptq
from lbllm_cli.runtime.units import Unit

# The projection of the heads' outputs, a unit of its own in every attention.
_OUTPUT = ("self_attn.o_proj",)


class _StopForward(Exception):
    """Raised by a hook: nothing after the last wanted linear needs to run."""


@contextmanager
def _inputs_of(block: Block, names: list[str], stop: bool) -> Iterator[dict[str, Tensor]]:
    """Collects what the named linears read in each forward pass; `stop` ends a pass at the last of them."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[name] = inputs[0]
        if stop and name == names[-1]:
            raise _StopForward

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
class _Moments:
    """Of one unit: estimated on most sequences, and on those held out to choose the target's strength, if any are."""

    fitted: InputMoments
    held_out: InputMoments | None


class _Collector:
    """Runs both streams through a block and sums the moments of what its linears read.

    In sequential order every unit needs a pass. What o_proj reads does not change after it was collected, so later passes
    start there: attention then runs 24 times instead of 56 for a block of eight batches. Kept only while the streams are in
    memory as well.
    """

    def __init__(self, task: BlockTask, student: Block, settings: Ptq):
        self.task = task
        self.student = student
        self.asymmetric = settings.asymmetric != 0
        rows = task.quantized.rows
        self.held = held_out_rows(rows, settings.held_out) if settings.asymmetric == "auto" else 0
        self.parts = ((0, rows - self.held), (rows - self.held, rows))
        self.keep = settings.sequential and task.quantized.path is None
        # What o_proj reads in the student, and in the teacher.
        self.known: dict[Block, HiddenStream] = {}

    def collect(self, units: tuple[Unit, ...]) -> dict[Unit, _Moments]:
        """Moments of some units' inputs, from one pass.

        The pass that reaches the block's last linear lets the teacher run on to its end: its outputs are the targets.
        """
        moments = {}
        for unit in units:
            size = self.student.linear(unit[0]).in_features
            fitted = InputMoments.empty(size, self.task.device, self.asymmetric)
            held_out = InputMoments.empty(size, self.task.device, True) if self.held else None
            moments[unit] = _Moments(fitted, held_out)
        names = [unit[0] for unit in units]
        last = units[-1] == self.student.units[-1]
        heads = self._heads(self.student.linear(names[0]).in_features) if self.keep and units == (_OUTPUT,) else {}
        with (
            self._attention() as attention,
            _inputs_of(self.student, names, stop=True) as read,
            _inputs_of(self.task.teacher, names, stop=not last) as wanted,
            ExitStack() as sinks,
        ):
            targets = sinks.enter_context(sink(self.task.targets, self.task.device)) if self.asymmetric and last else None
            keeping = {block: sinks.enter_context(sink(stream, self.task.device)) for block, stream in heads.items()}
            for rows, hidden, full, known in self._pieces(list(attention)):
                for stub, state in zip(attention.values(), known, strict=True):
                    stub.heads = state
                self._pass(rows, hidden, full, targets)
                for unit in units:
                    held_out = moments[unit].held_out
                    part = moments[unit].fitted if rows.start < self.parts[0][1] or held_out is None else held_out
                    part.add(read[unit[0]], wanted.get(unit[0]))
                for block, out in keeping.items():
                    out.put(rows, (read if block is self.student else wanted)[_OUTPUT[0]])
        self.known |= heads
        return moments

    def _pieces(self, attention: list[Block]) -> Iterator[tuple[slice, Tensor, Tensor | None, tuple[Tensor, ...]]]:
        """Rows, their quantized and full-precision inputs, and what is known of their heads in some blocks."""
        task = self.task
        pieces = [rows for first, end in self.parts for rows in batches(first, end, task.batch_size)]
        streams = [task.quantized, *([task.full] if self.asymmetric else []), *(self.known[block] for block in attention)]
        for rows, (hidden, *others) in zip(pieces, fetched(tuple(streams), pieces, task.device), strict=True):
            interrupt.check()
            full = others.pop(0) if self.asymmetric else None
            yield rows, hidden, full, tuple(others)

    def _pass(self, rows: slice, hidden: Tensor, full: Tensor | None, targets: Sink | None) -> None:
        with suppress(_StopForward):
            if targets is not None and full is not None:
                self.task.run_teacher(rows, full, targets)
            elif full is not None:
                self.task.teacher(full)
        with suppress(_StopForward):
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


def fit_block(task: BlockTask, settings: Ptq) -> BlockResult:
    """Binarizes the linears of one block.

    Facts: per linear the output error relative to its target, the strength of the asymmetric target and the damping used.
    Raises RunError naming block and linear when an input or a Hessian is not finite.
    """
    student = task.teacher.sharing()
    collector = _Collector(task, student, settings)
    tensors: dict[str, Tensor] = {}
    fits: dict[str, _Fit] = {}
    every = student.units
    passes: list[tuple[Unit, ...]] = [(unit,) for unit in every] if settings.sequential else [every]
    for units in passes:
        moments = collector.collect(units)
        for unit in units:
            found = _fit_unit(task, unit, moments.pop(unit), settings)
            fits |= found
            for name, fit in found.items():
                tensors |= fit.packed.to_tensors(block_prefix(task.index) + name)
                student.set_weight(name, fit.packed.values())
    return BlockResult(tensors, {"linears": _facts(fits)})


class _Fit(NamedTuple):
    """A linear's fit. error: relative to its target, []. strength: of the asymmetric target, []. damping: used."""

    packed: PackedWeight
    error: Tensor
    strength: Tensor
    damping: float


def _facts(fits: dict[str, _Fit]) -> dict[str, Any]:
    """What a record says of each linear; the device is waited for once."""
    numbers = torch.stack([torch.stack([fit.error, fit.strength]) for fit in fits.values()]).tolist()
    return {
        name: {"error": error, "asymmetric": round(strength, 4), "damping": fit.damping}
        for (name, fit), (error, strength) in zip(fits.items(), numbers, strict=True)
    }


def _fit_unit(task: BlockTask, unit: Unit, moments: _Moments, settings: Ptq) -> dict[str, _Fit]:
    """Fits the linears that share an input, as one matrix: rows are independent given H."""
    everything = moments.fitted if moments.held_out is None else moments.fitted.plus(moments.held_out)
    sources = [task.teacher.linear(name).weight.float() for name in unit]
    try:
        hessian, factor, damping = inverse_factor(everything.mean_hessian(), settings.damping)
        strengths = _strengths(sources, moments, factor, settings)
        targets = sources
        if everything.drift is not None:
            drift = everything.mean_drift()
            targets = [
                torch.where(strength > 0, weight + strength * target_step(weight, drift, factor), weight)
                for weight, strength in zip(sources, strengths, strict=True)
            ]
        packed = _fit_matrix(torch.cat(targets), hessian, factor, settings)
    except (FloatingPointError, ValueError) as error:
        raise RunError(f"block {task.index}, {' and '.join(unit)}: {error}; the block was not written") from None
    split = packed.split([weight.shape[0] for weight in sources])
    mean = everything.mean_hessian()
    errors = [output_error(target, part.values(), mean) for target, part in zip(targets, split, strict=True)]
    return {
        name: _Fit(part, error, strength, damping)
        for name, part, error, strength in zip(unit, split, errors, strengths, strict=True)
    }


def _strengths(weights: list[Tensor], moments: _Moments, factor: Tensor, settings: Ptq) -> list[Tensor]:
    """Length of each linear's step towards the asymmetric target, [].

    The held-out sequences take no part in the drift that the step follows, only in H, which gives it its metric.
    """
    if moments.held_out is None:
        assert settings.asymmetric != "auto"
        return [factor.new_full((), settings.asymmetric)] * len(weights)
    steps = [target_step(weight, moments.fitted.mean_drift(), factor) for weight in weights]
    return [step_length(weight, step, moments.held_out) for weight, step in zip(weights, steps, strict=True)]


def _fit_matrix(weight: Tensor, hessian: Tensor, factor: Tensor, settings: Ptq) -> PackedWeight:
    """Levels and codes of a matrix."""
    size = settings.group_size
    importance = hessian.diagonal() if settings.importance == "hessian_diagonal" else None

    def fit(group: Tensor, weights: Tensor) -> Tensor:
        if settings.levels == "quantile":
            return quantile_levels(group)
        return fit_levels(group, weights, settings.em_iterations)

    found = compensate(weight, factor, size, fit, settings.compensation, importance)
    if settings.code_descent and settings.rounds:
        # Before the first refit: reaches in one round what refitting first takes two rounds for.
        found = descend_codes(weight, hessian, found, size)
    for _ in range(settings.rounds):
        if settings.refit:
            found = refit_levels(weight, hessian, found, size)
        if settings.code_descent:
            found = descend_codes(weight, hessian, found, size)
    return PackedWeight.of_ranks(found.ranks, found.levels, found.scale, size)
