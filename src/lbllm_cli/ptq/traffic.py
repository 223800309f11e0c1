"""What ranks hand over where blocks are binarized, in bytes, out of shapes and a recipe."""

from collections.abc import Sequence

from lbllm_cli.parallel.shares import padded, share_of
from lbllm_cli.pipeline.traffic import ALL_REDUCE, GATHER, REDUCE, Call, packed_sizes
from lbllm_cli.ptq.passes import Pass, is_down, matrices
from lbllm_cli.ptq.teams import owners_of
from lbllm_cli.recipe.schema import Ptq
from lbllm_cli.runtime.experts import expert_of
from lbllm_cli.runtime.units import Unit

# Of each linear two sums over rows, float32: the error of its outputs and what that is relative to; along a step and its square.
_SUMS = 8


def ptq_calls(shapes: dict[Unit, list[tuple[int, int]]], passes: Sequence[Pass], settings: Ptq, size: int) -> list[Call]:
    """Calls of a block. shapes: of each unit's linears, (out, in). passes: as a fit makes them. size: ranks.

    Moments are sums over all sequences: float32 [in, in] matrices of every unit. Where ranks fit rows of a unit, all of them need
    its moments, and sums over its rows; the rows are gathered. Otherwise its owner alone does, and whole units are gathered.
    """
    calls, common = [], set[bool]()
    for units in passes:
        own = {unit: shapes[unit] for unit in units}
        owners = owners_of(own, size)
        for unit, linears in own.items():
            kind = ALL_REDUCE if owners is None else REDUCE
            calls.append(_moments(unit, linears, settings, kind))
            if expert_of(unit[0]) is not None and is_down(unit) not in common:
                common.add(is_down(unit))
                calls.append(_moments(unit, linears, settings, ALL_REDUCE))
            if owners is None:
                count = 1 + (settings.asymmetric == "auto")
                calls.append(Call("sums over rows", ALL_REDUCE, _SUMS * len(linears), count))
        calls.append(Call("packed weights", GATHER, max(_fitted(own, owners, settings, rank, size) for rank in range(size)), 1))
    return calls


def _moments(unit: Unit, linears: list[tuple[int, int]], settings: Ptq, kind: str) -> Call:
    return Call(f"moments of {unit[0]}", kind, 4 * linears[0][1] ** 2, matrices(settings))


def _fitted(
    shapes: dict[Unit, list[tuple[int, int]]], owners: dict[Unit, int] | None, settings: Ptq, rank: int, size: int
) -> int:
    """Bytes of what a rank has fitted in a pass, as they are gathered."""
    if owners is None:
        parts = [(len(share_of(out, rank, size)), inn) for linears in shapes.values() for out, inn in linears]
    else:
        parts = [linear for unit, linears in shapes.items() if owners[unit] == rank for linear in linears]
    return sum(padded(tensor) for part in parts for tensor in packed_sizes(part, settings))
