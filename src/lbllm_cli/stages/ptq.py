"""Stage 1: Hessian-weighted EM with error compensation, block by block (LBLLM stage 1; refinement and target are ours)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.errors import RunError
from lbllm_cli.model import UNITS, Block, block_prefix
from lbllm_cli.ops.binarize import codes_from_ranks, dequantize, pack_codes
from lbllm_cli.ops.compensate import compensate
from lbllm_cli.ops.em import fit_levels, quantile_levels
from lbllm_cli.ops.hessian import InputMoments, inverse_factor
from lbllm_cli.ops.refine import descend_codes, output_error, refit_levels
from lbllm_cli.ops.target import step_length, target_step
from lbllm_cli.recipe import Ptq
from lbllm_cli.stream import BlockTask, batches

Unit = tuple[str, ...]


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


@dataclass
class _Moments:
    """Of one unit: estimated on most sequences, and on those held out to choose the target's strength."""

    fitted: InputMoments
    held_out: InputMoments


def fit_block(task: BlockTask, settings: Ptq) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Binarizes the linears of one block.

    Returns the packed tensors under their full names, and facts: per linear the output error relative to its
    target, the strength of the asymmetric target and the damping used.
    Raises RunError naming block and linear when an input or a Hessian is not finite.
    """
    student = task.teacher.sharing()
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"linears": {}}
    passes: list[tuple[Unit, ...]] = [(unit,) for unit in UNITS] if settings.sequential else [UNITS]
    for units in passes:
        moments = _collect(task, student, units, settings)
        for unit in units:
            packed, linears = _fit_unit(task, unit, moments.pop(unit), settings)
            facts["linears"] |= linears
            for name, (weight, levels, scale, values) in packed.items():
                full = block_prefix(task.index) + name
                tensors |= {f"{full}.weight": weight, f"{full}.levels": levels, f"{full}.scale": scale}
                student.set_weight(name, values)
    return tensors, facts


def _collect(task: BlockTask, student: Block, units: tuple[Unit, ...], settings: Ptq) -> dict[Unit, _Moments]:
    """Moments of the inputs of some units, from one pass over both streams.

    The pass that reaches the block's last linear lets the teacher run on to its end: its outputs are the targets, and
    a pass of their own would cost a fourth of all forward work.
    """
    asymmetric = settings.asymmetric != 0
    rows_total = task.quantized.rows
    held = max(1, round(settings.held_out * rows_total)) if settings.asymmetric == "auto" else 0
    names = [unit[0] for unit in units]
    to_the_end = units[-1] == UNITS[-1]
    moments = {}
    for unit in units:
        size = student.linear(unit[0]).in_features
        moments[unit] = _Moments(*(InputMoments.empty(size, task.device, asymmetric) for _ in range(2)))
    with _inputs_of(student, names, stop=True) as read, _inputs_of(task.teacher, names, stop=not to_the_end) as wanted:
        for first, last in ((0, rows_total - held), (rows_total - held, rows_total)):
            for rows in batches(first, last, task.batch_size):
                if asymmetric and to_the_end:
                    task.run_teacher(rows)
                elif asymmetric:
                    with suppress(_StopForward):
                        task.teacher(task.full.data[rows].to(task.device))
                with suppress(_StopForward):
                    student(task.quantized.data[rows].to(task.device))
                for unit in units:
                    part = moments[unit].fitted if first == 0 else moments[unit].held_out
                    part.add(read[unit[0]], wanted.get(unit[0]))
    return moments


def _fit_unit(
    task: BlockTask, unit: Unit, moments: _Moments, settings: Ptq
) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor, Tensor]], dict[str, Any]]:
    """Fits the linears that share an input, as one matrix: rows are independent given H."""
    everything = moments.fitted.plus(moments.held_out)
    sources = [task.teacher.linear(name).weight.float() for name in unit]
    try:
        hessian, factor, damping = inverse_factor(everything.mean_hessian(), settings.damping)
        strengths = _strengths(sources, moments, settings)
        targets = [
            weight + strength * target_step(weight, everything.mean_drift(), factor) if strength else weight
            for weight, strength in zip(sources, strengths, strict=True)
        ]
        packed = _fit_matrix(torch.cat(targets), hessian, factor, settings)
    except (FloatingPointError, ValueError) as error:
        raise RunError(f"block {task.index}, {' and '.join(unit)}: {error}; the block was not written") from None
    sizes = [weight.shape[0] for weight in sources]
    split = list(zip(*(torch.split(part, sizes) for part in packed), strict=True))
    facts = {}
    for name, target, parts, strength in zip(unit, targets, split, strengths, strict=True):
        relative = output_error(target, parts[3], everything.mean_hessian())
        facts[name] = {"error": relative, "asymmetric": round(strength, 4), "damping": damping}
    return dict(zip(unit, split, strict=True)), facts


def _strengths(weights: list[Tensor], moments: _Moments, settings: Ptq) -> list[float]:
    """Length of each linear's step towards the asymmetric target."""
    if settings.asymmetric != "auto":
        return [settings.asymmetric] * len(weights)
    _, factor, _ = inverse_factor(moments.fitted.mean_hessian(), settings.damping)
    steps = [target_step(weight, moments.fitted.mean_drift(), factor) for weight in weights]
    return [step_length(weight, step, moments.held_out) for weight, step in zip(weights, steps, strict=True)]


def _fit_matrix(weight: Tensor, hessian: Tensor, factor: Tensor, settings: Ptq) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Levels and codes of a matrix: packed codes, levels and scale as stored, and the float32 weights they stand for."""
    size = settings.group_size
    importance = hessian.diagonal() if settings.importance == "hessian_diagonal" else None
    taken = 0

    def fit(group: Tensor, inverse_importance: Tensor) -> Tensor:
        nonlocal taken
        columns = slice(taken, taken + group.shape[1])
        taken += group.shape[1]
        if settings.levels == "quantile":
            return quantile_levels(group)
        weights = inverse_importance if importance is None else importance[columns]
        return fit_levels(group, weights, settings.em_iterations)

    found = compensate(weight, factor, size, fit, settings.compensation)
    for _ in range(settings.rounds):
        if settings.refit:
            found = refit_levels(weight, hessian, found, size)
        if settings.code_descent:
            found = descend_codes(weight, hessian, found, size)
    codes, levels = codes_from_ranks(found.ranks, found.levels, found.scale)
    return pack_codes(codes, size), levels, found.scale, dequantize(codes, levels, found.scale, size)


def expected_bits(shapes: list[tuple[int, int]], group_size: int) -> float:
    """Bits per weight of the packed form: codes, int8 levels and float16 scales, padding of ragged groups included.

    [(4096, 4096)], 128 -> 2.375.
    """
    bits = sum(out * math.ceil(inn / group_size) * (2 * group_size + 4 * 8 + 16) for out, inn in shapes)
    return bits / sum(out * inn for out, inn in shapes)
