"""What ranks hand over where something is trained, in bytes, out of shapes and a recipe.

Where weights or bitmaps are trained, a step reduces the gradient of each linear's weight to its owner and broadcasts the weight
again. What every rank has a copy of is summed: its gradients.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from lbllm_cli.core.splits import held_out_rows
from lbllm_cli.format.levels import per_row
from lbllm_cli.format.names import KEYS, VALUES, input_name
from lbllm_cli.format.weights import group_count
from lbllm_cli.models.model import FINAL_NORM, SourceModel
from lbllm_cli.parallel.shares import padded
from lbllm_cli.pipeline.duration import steps
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.traffic import (
    ALL_REDUCE,
    BACKWARD,
    BROADCAST,
    FORWARD,
    GATHER,
    OWNERS,
    REDUCE,
    Call,
    Exchanged,
    packed_sizes,
    sample_call,
)
from lbllm_cli.pipeline.world import World
from lbllm_cli.recipe.schema import Ptq
from lbllm_cli.recipe.stages import StageSpec
from lbllm_cli.recipe.training import ActCalib, ActEndToEnd, Distill, EndToEnd, Schedule
from lbllm_cli.training.interfaces import SEQUENCES
from lbllm_cli.training.quantizers import CLIP_FACTORS, KNEES
from lbllm_cli.training.spread import is_large, loads_of, owners_of

Shapes = Mapping[str, tuple[int, int]]
# Numbers of a step that every rank has one of, float32: its loss and the square of its gradients' norm.
_NUMBERS = 2


def gathered_bytes(shapes: Shapes, owners: Mapping[str, int], settings: Ptq, common: Iterable[int] = ()) -> int:
    """Bytes of each rank where owners of packed linears give them to all: as many as the one with most. common: of tensors that
    every rank has beside its own."""
    loads: dict[int, int] = {}
    for name, rank in owners.items():
        loads[rank] = loads.get(rank, 0) + sum(map(padded, packed_sizes(shapes[name], settings)))
    return max(loads.values()) + sum(map(padded, common))


def copied_bytes(sizes: Sequence[int]) -> int:
    """Bytes of a sum of gradients. sizes: of parameters that every rank has a copy of, in numbers; float32."""
    return 4 * sum(sizes)


def level_sizes(shapes: Shapes, group_size: int, each: Sequence[int]) -> list[int]:
    """Numbers in the parameters of linears. each: in a group, of the parameters of one linear."""
    return [rows * group_count(width, group_size) * count for rows, width in shapes.values() for count in each]


def _quantizers(model: SourceModel, settings: ActCalib) -> list[tuple[bool, int, int]]:
    """Of a block's quantizers: whether they have knees, tables, levels in a table."""
    inputs = dict.fromkeys(map(input_name, model.units))
    found = []
    for name in (*inputs, KEYS, VALUES):
        cached = name in (KEYS, VALUES)
        knee = (settings.kv_form if cached else settings.form) == "knee"
        found.append((knee, settings.tables if knee else 1, 2 ** (settings.kv_bits if cached else settings.bits)))
    return found


def quantizer_sizes(model: SourceModel, settings: ActCalib, trained: Iterable[str]) -> list[int]:
    """Numbers in each trained parameter of a block's quantizers: of each table two clipping factors, and two ratios of knees."""
    kinds = set(trained)
    sizes = []
    for knee, tables, _ in _quantizers(model, settings):
        sizes += [2 * tables] * ((CLIP_FACTORS in kinds) + (KNEES in kinds and knee))
    return sizes


def _weight_calls(shapes: Shapes, world: World, itemsize: int, count: int, more: int, blocks: int) -> list[Call]:
    """Of weights whose masters are spread. count: steps. more: times that weights are spread beside those. blocks: trained
    together."""
    operations, whole = len(shapes) * blocks, sum(map(prod, shapes.values())) * itemsize * blocks
    calls = [
        Call("gradients of weights to their owners", REDUCE, whole, count, step=True, node=True, beside=BACKWARD,
             operations=operations),
        Call("weights from their owners", BROADCAST, whole, count, step=True, node=True, beside=FORWARD, operations=operations),
        Call("weights that are measured", BROADCAST, whole, more, node=True, operations=operations),
    ]  # fmt: skip
    if world.machines > 1:
        most = max(loads_of(shapes, world.node, blocks)) * itemsize
        each = -(-operations // world.node)
        calls.append(
            Call("gradients between owners", OWNERS, most, count, step=True, beside=BACKWARD, operations=each, together=whole)
        )
    return calls


def _exchanged(plan: Plan, settings: Schedule, rows: int, calls: list[Call], copies: list[int], blocks: int) -> Exchanged:
    """With what every step has. copies: numbers in parameters of which every rank has one."""
    held, world = held_out_rows(rows, settings.held_out), plan.world
    count = steps(rows, held, settings.batch_size, settings.epochs)
    if copies:
        calls.append(Call("gradients of copies", ALL_REDUCE, copied_bytes(copies), count, step=True))
    calls.append(Call("loss and norm", ALL_REDUCE, 4 * _NUMBERS, count, step=True, operations=_NUMBERS))
    micro = -(-world.most(settings.batch_size) // settings.micro_batch_size)
    # Between steps whether one was stopped, in them which weights were used; errors and facts at the ends.
    said = count * (1 + is_large(settings.trained)) + 4 * (settings.epochs + 2)
    return Exchanged(tuple(calls), blocks, count, micro, said)


def block_exchanged(plan: Plan, spec: StageSpec, settings: Distill | ActCalib) -> Exchanged:
    """What ranks hand over in a stage that trains block by block: of every block the same, where every epoch is better than the
    ones before. Of an epoch that is not, nothing is gathered."""
    model, text, world = plan.model, plan.token_set(spec), plan.world
    rows = settings.subset or text.sequences
    count = steps(rows, held_out_rows(rows, settings.held_out), settings.batch_size, settings.epochs)
    shapes, act = model.linear_shapes, isinstance(settings, ActCalib)
    copies = quantizer_sizes(model, settings, settings.trained) if isinstance(settings, ActCalib) else []
    calls = []
    if is_large(settings.trained):
        # As it begins and after every epoch; quantizers are fitted to what the block computes.
        calls = _weight_calls(shapes, world, model.dtype.itemsize, count, 1 + settings.epochs + act, 1)
        (owners,) = owners_of(shapes, world.node)
        size = gathered_bytes(shapes, owners, plan.recipe.ptq)
        calls.append(Call("packed weights of a better epoch", GATHER, size, settings.epochs, node=True))
        if act:
            calls.append(Call("packed weights as they begin", GATHER, size, 1, node=True))
    elif "levels" in settings.trained:
        copies = level_sizes(shapes, plan.recipe.ptq.group_size, [4]) + copies
    row_bytes = text.length * int(model.config.hidden_size) * model.dtype.itemsize
    if act:
        calls.append(sample_call("sequences that quantizers are fitted to", world, rows, SEQUENCES, row_bytes))
    if settings.channel_cap is not None:
        calls.append(sample_call("sequences that channels are weighed by", world, rows, SEQUENCES, row_bytes))
    return _exchanged(plan, settings, rows, calls, copies, model.blocks)


def whole_exchanged(plan: Plan, settings: EndToEnd) -> Exchanged:
    """What ranks hand over in an end-to-end phase: of all blocks at once, where every epoch is better than the ones before."""
    model, world, trained = plan.model, plan.world, set(settings.trained)
    count = steps(settings.sequences, held_out_rows(settings.sequences, settings.held_out), settings.batch_size, settings.epochs)
    shapes, blocks, calls, copies = model.linear_shapes, model.blocks, list[Call](), list[int]()
    norms = [[model.count([name]) for name in model.norm_names(index)] for index in range(blocks)]
    acts = isinstance(settings, ActEndToEnd)
    if is_large(trained):
        calls = _weight_calls(shapes, world, model.dtype.itemsize, count, 1 + settings.epochs, blocks)
        # Beside the weights norms in 16 bits, and of quantizers tables, zeros, factors and the centres of keys.
        tables = [size for knee, n, levels in _quantizers(model, plan.recipe.act_calib) for size in (n * levels, n * knee, 8 * n)]
        if plan.recipe.act_calib.key_centre == "mean" and model.family.plain_softmax:
            tables.append(4 * model.kv_width)
        size = sum(
            gathered_bytes(shapes, owners, plan.recipe.ptq, [*(2 * norm for norm in own), *(tables if acts else ())])
            for owners, own in zip(owners_of(shapes, world.node, blocks), norms, strict=True)
        )
        calls.append(Call("weights of a better epoch", GATHER, size, settings.epochs, node=True, operations=blocks))
    else:
        ptq = plan.recipe.ptq
        if "scales" in trained and per_row(ptq.level_bits):
            copies = [rows for rows, _ in shapes.values()] * blocks
        else:
            each = [1] if "scales" in trained else [4] if "levels" in trained else []
            copies = level_sizes(shapes, ptq.group_size, each) * blocks
    if "norms" in trained:
        copies += [*(norm for own in norms for norm in own), model.count([FINAL_NORM])]
    if acts:
        copies += quantizer_sizes(model, plan.recipe.act_calib, trained) * blocks
    return _exchanged(plan, settings, settings.sequences, calls, copies, 1)
