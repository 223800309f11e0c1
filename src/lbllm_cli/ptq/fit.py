"""Stage 1: Hessian-weighted EM with error compensation, block by block (LBLLM stage 1; refinement and target are ours)."""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbllm_cli.core.errors import RunError
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.format.levels import per_row
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.models.block import Block, block_prefix
from lbllm_cli.pipeline.block_loop import BlockResult, BlockTask
from lbllm_cli.ptq.collect import Collector, Moments
from lbllm_cli.ptq.compensate import compensate, level_importance
from lbllm_cli.ptq.em import fit_levels, quantile_levels
from lbllm_cli.ptq.moments import inverse_factor
from lbllm_cli.ptq.passes import experts_at_once, passes_of
from lbllm_cli.ptq.refine import descend_codes, output_errors, refit_levels, relative_error
from lbllm_cli.ptq.row_levels import descend_levels, fit_row_scale, refit_scale
from lbllm_cli.ptq.target import parabola, step_length, target_step
from lbllm_cli.ptq.teams import Team, gathered_weights, teams_of
from lbllm_cli.recipe.schema import Ptq
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.units import Unit


def fit_block(task: BlockTask, settings: Ptq, sizes: GroupSizes) -> BlockResult:
    """Binarizes the linears of one block. sizes: of all linears' groups.

    Facts: per linear the output error relative to its target, the strength of the asymmetric target and the damping used; experts
    that fewer tokens reach than an input is wide, which are fitted with the moments of all tokens beside their own.
    Raises RunError naming block and linear when an input or a Hessian is not finite.
    """
    student = task.teacher.sharing()
    collector = Collector(task, student, settings)
    tensors: dict[str, Tensor] = {}
    fits: dict[str, _Fit] = {}
    widths = {unit: student.linear(unit[0]).in_features for unit in student.units}
    # What is free on one rank is not what is free on another, and all go through the same passes.
    free = min(task.group.facts(backend_of(task.device).free_memory(task.device)))
    passes = passes_of(student.units, settings.sequential, experts_at_once(widths, settings, free))
    for units in passes:
        teams = teams_of({unit: [_shape(student, name) for name in unit] for unit in units}, task.group)
        moments = collector.collect(teams, last=units == passes[-1])
        found: dict[str, _Fit] = {}
        for unit in list(moments):
            size = sizes.of_unit(task.index, unit)
            found |= _fit_unit(task, unit, moments.pop(unit), teams[unit], settings, size)
        fits |= found
        inputs = {name: widths[unit] for unit in units for name in unit}
        for name, packed in gathered_weights(task.group, {name: fit.packed for name, fit in found.items()}, inputs).items():
            tensors |= packed.to_tensors(block_prefix(task.index) + name)
            student.set_weight(name, packed.values())
    facts = {name: fact for one in task.group.facts(_facts(fits)) for name, fact in one.items()}
    _check_finite(task.index, facts)
    return BlockResult(tensors, {"linears": {name: facts[name] for name in student.linears}, **_starved(facts)})


def _check_finite(index: int, facts: dict[str, dict[str, Any]]) -> None:
    """Raises RunError naming the first linear whose target was not finite: levels fit it all the same, and are 0. Looked at
    where the device is waited for anyway.
    """
    for name, fact in facts.items():
        if not math.isfinite(fact["error"] + fact["asymmetric"]):
            raise RunError(
                f"block {index}, {name}: inputs of the full-precision block hold NaN or infinity; try model.dtype: float32; "
                "the block was not written"
            )


def _shape(block: Block, name: str) -> tuple[int, int]:
    linear = block.linear(name)
    return linear.out_features, linear.in_features


class _Fit(NamedTuple):
    """A linear's fit. packed: the rows that this rank has fitted. error: relative to its target, []. strength: of the asymmetric
    target, []. damping: used. routed: see `Moments`.
    """

    packed: PackedWeight
    error: Tensor
    strength: Tensor
    damping: float
    routed: tuple[int, float] | None


def _facts(fits: dict[str, _Fit]) -> dict[str, Any]:
    """What a record says of each linear; the device is waited for once."""
    if not fits:
        return {}
    numbers = torch.stack([torch.stack([fit.error, fit.strength]) for fit in fits.values()]).tolist()
    return {
        name: {"error": error, "asymmetric": round(strength, 4), "damping": fit.damping, **_routing(fit)}
        for (name, fit), (error, strength) in zip(fits.items(), numbers, strict=True)
    }


def _starved(facts: dict[str, Any]) -> dict[str, Any]:
    """Experts that fewer tokens than the width of an input reach, with how many did. facts: of all linears."""
    few = {name.rpartition(".")[0]: fact["tokens"] for name, fact in facts.items() if fact.get("own", 1) < 1}
    return {"starved": few} if few else {}


def _routing(fit: _Fit) -> dict[str, Any]:
    """Of an expert's linear: the tokens that reached it, and how much its own moments counted."""
    return {} if fit.routed is None else {"tokens": fit.routed[0], "own": round(fit.routed[1], 4)}


def _fit_unit(
    task: BlockTask, unit: Unit, moments: Moments, team: Team, settings: Ptq, group_size: int
) -> dict[str, _Fit]:  # fmt: skip
    """Fits the linears that share an input, as one matrix: rows are independent given H. team: who fits which rows."""
    everything = moments.fitted if moments.held_out is None else moments.fitted.plus(moments.held_out)
    weights = [task.teacher.linear(name).weight for name in unit]
    sources = [weight[team.rows(len(weight))].float() for weight in weights]
    try:
        hessian, factor, damping = inverse_factor(everything.mean_hessian(), settings.damping)
        strengths = _strengths(sources, moments, factor, team, settings)
        targets = sources
        if everything.drift is not None:
            drift = everything.mean_drift()
            targets = [
                torch.where(strength > 0, weight + strength * target_step(weight, drift, factor), weight)
                for weight, strength in zip(sources, strengths, strict=True)
            ]
        packed = fit_matrix(torch.cat(targets), hessian, factor, settings, group_size)
    except (FloatingPointError, ValueError) as error:
        raise RunError(f"block {task.index}, {' and '.join(unit)}: {error}; the block was not written") from None
    split = packed.split([weight.shape[0] for weight in sources])
    mean = everything.mean_hessian()
    sums = torch.stack([output_errors(target, part.values(), mean) for target, part in zip(targets, split, strict=True)])
    team.together.add(sums)
    errors = relative_error(sums)
    return {
        name: _Fit(part, error, strength, damping, moments.routed)
        for name, part, error, strength in zip(unit, split, errors, strengths, strict=True)
    }


def _strengths(weights: list[Tensor], moments: Moments, factor: Tensor, team: Team, settings: Ptq) -> list[Tensor]:
    """Length of each linear's step towards the asymmetric target, [].

    The held-out sequences take no part in the drift that the step follows, only in H, which gives it its metric.
    """
    if moments.held_out is None:
        assert settings.asymmetric != "auto"
        return [factor.new_full((), settings.asymmetric)] * len(weights)
    steps = [target_step(weight, moments.fitted.mean_drift(), factor) for weight in weights]
    parabolas = torch.stack([parabola(weight, step, moments.held_out) for weight, step in zip(weights, steps, strict=True)])
    team.together.add(parabolas)
    return list(step_length(parabolas))


def fit_matrix(weight: Tensor, hessian: Tensor, factor: Tensor, settings: Ptq, size: int) -> PackedWeight:
    """Levels and codes of a matrix, in groups of `size`.

    weight: float32 [out, in]. hessian: float32 [in, in] of its inputs. factor: upper factor of its damped inverse, see
    `moments.inverse_factor`. out=960, in=576, size=16 -> codes [960, 36, 4]. Raises ValueError for levels that no scale reaches.
    """
    rows = per_row(settings.level_bits)
    importance = hessian.diagonal() if settings.importance == "hessian_diagonal" else level_importance(factor)

    def fit(group: Tensor, weights: Tensor, scale: Tensor | None = None) -> Tensor:
        if settings.levels == "quantile":
            return quantile_levels(group)
        return fit_levels(group, weights, settings.em_iterations, scale)

    scale = fit_row_scale(weight, importance, size, fit) if rows else None
    on_table = partial(fit, scale=None if scale is None else scale[:, 0])
    found = compensate(weight, factor, size, on_table, settings.compensation, importance, settings.level_bits, scale)
    if settings.code_descent and settings.rounds:
        # Before the first refit: reaches in one round what refitting first takes two rounds for.
        found = descend_codes(weight, hessian, found, size)
    for _ in range(settings.rounds):
        if settings.refit:
            found = (descend_levels if rows else refit_levels)(weight, hessian, found, size)
        if settings.code_descent:
            found = descend_codes(weight, hessian, found, size)
    if rows and settings.refit:
        found = refit_scale(weight, hessian, found, size)
    return PackedWeight.of_ranks(found.ranks, found.levels, found.scale, size, found.level_bits)
