"""Which units' moments come of one pass over the calibration text."""

from lbllm_cli.recipe.schema import Ptq
from lbllm_cli.runtime.experts import DOWN, expert_of
from lbllm_cli.runtime.units import Unit, Units

# One pass of a fit: units, whose inputs are summed up in it.
Pass = tuple[Unit, ...]


def passes_of(units: Units, sequential: bool, at_once: int) -> list[Pass]:
    """Passes over a block's units in their order. sequential: one after another; experts' units of a kind go together, `at_once`
    experts in a pass. Otherwise all units in one pass.

    Two experts, one at once: (q, k, v), (o), (gate, up of 0), (gate, up of 1), (down of 0), (down of 1).
    """
    if not sequential:
        return [units]
    kinds: dict[object, list[Unit]] = {}
    for unit in units:
        place = expert_of(unit[0])
        kinds.setdefault(unit if place is None else place[2], []).append(unit)
    return [tuple(kind[start : start + at_once]) for kind in kinds.values() for start in range(0, len(kind), at_once)]


def matrices(settings: Ptq) -> int:
    """Matrices of moments that a unit has: of fitted and of held-out sequences, H and drift of each."""
    return (2 if settings.asymmetric != 0 else 1) * (2 if settings.asymmetric == "auto" else 1)


def experts_at_once(widths: dict[Unit, int], settings: Ptq, free: float) -> int:
    """Experts whose moments may be held together: a quarter of the memory that is free, bytes. No result depends on it.

    widths: of the inputs of a block's units. Experts 2048 wide at most, four matrices, 20e9 -> 74.
    """
    widest = max((width for unit, width in widths.items() if expert_of(unit[0]) is not None), default=1)
    return max(1, int(free / 4 / (matrices(settings) * 4.0 * widest**2)))


def is_down(unit: Unit) -> bool:
    """Whether what an expert's unit reads is its own inner state, and not what the block's experts read."""
    return unit[0].endswith(f".{DOWN}")
