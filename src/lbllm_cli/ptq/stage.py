"""Stage 1 in the pipeline."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from torch import Tensor

from lbllm_cli.format.levels import per_row
from lbllm_cli.format.weights import group_count
from lbllm_cli.models.block import block_prefix
from lbllm_cli.models.model import SourceModel
from lbllm_cli.parallel.shares import share_of
from lbllm_cli.pipeline.block_loop import BlockLoop
from lbllm_cli.pipeline.duration import BlockShape, Part
from lbllm_cli.pipeline.forecast import Need, activation_bytes, block_bytes, stage_need
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.traffic import Exchanged
from lbllm_cli.pipeline.work import StageRun, parents_activations
from lbllm_cli.ptq.collect import held_out
from lbllm_cli.ptq.fit import fit_block
from lbllm_cli.ptq.passes import Pass, experts_at_once, is_down, matrices, passes_of
from lbllm_cli.ptq.teams import owners_of
from lbllm_cli.ptq.traffic import ptq_calls
from lbllm_cli.recipe.schema import Ptq
from lbllm_cli.recipe.stages import StageSpec
from lbllm_cli.runtime.experts import expert_of
from lbllm_cli.runtime.units import Unit

activations = parents_activations


def check(plan: Plan) -> None:
    """Every recipe can be binarized."""


def need(plan: Plan, spec: StageSpec, tokens: Tensor | None) -> Need:
    """Need of `lbllm ptq`."""
    recipe, model, text = plan.recipe, plan.model, plan.token_set(spec)
    heads = model.shapes[f"{block_prefix(0)}self_attn.o_proj.weight"][1] / model.config.hidden_size
    rows = min(plan.world.most(text.sequences), recipe.runtime.batch_size)
    # Teacher, and the student's replaced weights beside it.
    device = 2 * block_bytes(model)
    if model.backend.kernels is None:
        device += activation_bytes(model, rows, text.length) + _fit_bytes(model, recipe.ptq)
    else:
        device += _fused_bytes(model, recipe.ptq, rows * text.length)
    # In sequential order the fit keeps what both streams' attention heads gave instead of computing it again.
    found = stage_need(plan, spec, device, 2 * heads if recipe.ptq.sequential else 0)
    keys = "lower runtime.batch_size, or set ptq.sequential: true or ptq.asymmetric: 0, which hold fewer Hessians at once"
    return replace(found, cheaper=keys)


def _fit_bytes(model: SourceModel, settings: Ptq) -> float:
    """Moments of the units collected together, and the work on the largest one: factor, inverse, weights, gradients."""
    shapes = {unit: [model.shapes[f"{block_prefix(0)}{name}.weight"] for name in unit] for unit in model.units}
    work = max(9 * 4.0 * unit[0][1] ** 2 + 7 * 4.0 * sum(out * inn for out, inn in unit) for unit in shapes.values())
    return _moment_bytes(model, settings) + work


def _passes(model: SourceModel, settings: Ptq) -> list[Pass]:
    """As a fit makes them with the memory that is free now."""
    widths = {unit: model.shapes[f"{block_prefix(0)}{unit[0]}.weight"][1] for unit in model.units}
    return passes_of(
        model.units, settings.sequential, experts_at_once(widths, settings, model.backend.free_memory(model.device))
    )


def _moment_bytes(model: SourceModel, settings: Ptq) -> float:
    """Matrices of moments of the pass that has most of them; of experts, of all tokens as well, for both kinds of inputs."""
    squares = {unit: 4.0 * model.shapes[f"{block_prefix(0)}{unit[0]}.weight"][1] ** 2 for unit in model.units}
    passes = _passes(model, settings)
    most = max(sum(squares[unit] for unit in units) for units in passes)
    common = {is_down(unit): square for unit, square in squares.items() if expert_of(unit[0]) is not None}
    return matrices(settings) * (most + sum(common.values()))


def _fused_bytes(model: SourceModel, settings: Ptq, tokens: int) -> float:
    """What the fit in kernels holds beside the block, or a pass that collects moments. tokens: of one pass.

    Of a unit's widest matrix of moments: those that are kept, their sums where some sequences were held out, and 5.2 in
    factorisations; of its weights three. Counted on the shapes of three models (scripts/bench/device_counts.py).
    """
    shapes = [[model.shapes[f"{block_prefix(0)}{name}.weight"] for name in unit] for unit in model.units]
    held, kinds = settings.asymmetric == "auto", matrices(settings)
    squares = [4.0 * unit[0][1] ** 2 for unit in shapes]
    weights = [4.0 * sum(out * inn for out, inn in unit) for unit in shapes]
    kept = _moment_bytes(model, settings)
    fit = max((kinds / 2 * held + 5.2) * square + 3 * weight for square, weight in zip(squares, weights, strict=True))
    passing = tokens * (10 * model.config.hidden_size + 4 * model.inner) * model.dtype.itemsize
    return 1.05 * (kept + max(fit, passing))


def work(plan: Plan, spec: StageSpec) -> list[Part]:
    """Passes that collect moments, the moments, and the fit."""
    settings, text, blocks = plan.recipe.ptq, plan.token_set(spec), plan.model.blocks
    shape, tokens = BlockShape.of(plan.model, text.length), float(plan.world.most(text.sequences) * text.length)
    kinds = 2 if settings.asymmetric != 0 else 1
    # Of each pass, the linears that a token goes through.
    each = dict(zip(plan.model.units, shape.inputs, strict=True))
    passes = _passes(plan.model, settings)
    sizes = [sum(width * rows * share for width, rows, share in map(each.__getitem__, units)) for units in passes]
    # Those before it; from what o_proj reads on, which is kept, in later passes.
    before = [sum(sizes[min(1, index) : index]) if index > 1 else sum(sizes[:index]) for index in range(len(sizes))]
    linears = kinds * sum(before) + sizes[-1] if settings.sequential else kinds * sum(sizes)
    passed = tokens * (2 * linears + kinds * shape.attention)
    moments = sum(float(width) ** 2 * share for width, _, share in shape.inputs) * tokens * (3 if kinds == 2 else 1)
    fit = sum(_fit_flops(plan.model, units, settings, plan.world.size) for units in passes)
    groups = sum(group_count(width, settings.group_size) for width, _, _ in shape.inputs)
    streams = 2 * shape.states(tokens)
    return [
        Part("passes over the calibration text", "data.calibration.sequences", blocks * (passed + shape.forward(tokens)),
             passed=blocks * shape.passes(tokens, kinds), read=blocks * (len(sizes) + 1) * streams,
             written=blocks * streams),
        Part("moments", "data.calibration.sequences", blocks * moments),
        Part("fits", "ptq.rounds", exact=blocks * fit, launches=blocks * groups * _launches_of_group(settings)),
    ]  # fmt: skip


def _launches_of_group(settings: Ptq) -> float:
    """Of a GPU, for a group of columns: as counted of LLaMA-2-7B's shape in groups of 128, and in groups of 16 with levels of 2
    bits (scripts/bench/device_counts.py)."""
    return 70.0 if per_row(settings.level_bits) else 60.0


def _fit_flops(model: SourceModel, units: Pass, settings: Ptq, size: int) -> float:
    """FLOP of a pass's fits, of the rank that has most: a factorisation of each unit that it takes part in; then products with a
    width's square for each of its rows: targets and their lengths, errors, descents, refits."""
    rounds = settings.rounds * (settings.refit + settings.code_descent)
    shapes = _unit_shapes(model, units)
    owners = owners_of(shapes, size)
    loads = [0.0] * size
    for unit, linears in shapes.items():
        width = float(linears[0][1])
        for rank in range(size) if owners is None else [owners[unit]]:
            rows = sum(out if owners is not None else len(share_of(out, rank, size)) for out, _ in linears)
            loads[rank] += 4 / 3 * width**3 + (16 + 5 * rounds) * rows * width**2
    return max(loads)


def _unit_shapes(model: SourceModel, units: Iterable[Unit]) -> dict[Unit, list[tuple[int, int]]]:
    """(out, in) of each unit's linears."""
    return {unit: [model.linear_shapes[name] for name in unit] for unit in units}


def exchanged(plan: Plan, spec: StageSpec) -> Exchanged:
    """Moments, and what was fitted."""
    model, settings = plan.model, plan.recipe.ptq
    passes = _passes(model, settings)
    calls = ptq_calls(_unit_shapes(model, model.units), passes, settings, plan.world.size)
    # Of each pass how many tokens its moments are of, and what is gathered; of a block its errors and facts.
    return Exchanged(tuple(calls), model.blocks, said=2 * len(passes) + 4)


def run(run: StageRun) -> None:
    """Fits block after block."""
    settings = run.plan.recipe.ptq
    fit = partial(fit_block, settings=settings, sizes=run.plan.model.group_sizes(settings))
    BlockLoop(run, held_out(settings, len(run.tokens))).run(fit)
