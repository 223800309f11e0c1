"""What the stored form is called and bounded by: read without torch too, by what runs an export on a CPU."""

import re

# T of an activation quantizer of up to 7 bits: with int8 levels its products are exact in integer dot products.
LATTICE_MAX = 127
# Levels of a group of weights, and bits that a file may have of each.
LEVELS = 4
LEVEL_BITS = (8, 4, 2)
# Levels of 2 bits are two pairs, in units of their row's scale: means of the inner and the outer pair, and half-widths of both. A
# byte has the place of the means in its low half. About what Lloyd's iteration gives for groups of 16 of two models
# (scripts/level_tables.py). Every inner level lies between the outer ones, and none reaches beyond 127.
_MEANS = ((-1, 3), (5, 2), (3, 9), (9, 8), (7, 17), (13, 14), (13, 28), (19, 23))
MEANS = (*_MEANS, *((-inner, -outer) for inner, outer in _MEANS))
HALF_WIDTHS = (
    (7, 23), (7, 26), (10, 29), (8, 31), (12, 33), (9, 35), (12, 38), (9, 41),
    (15, 41), (11, 45), (15, 48), (11, 51), (17, 55), (13, 60), (17, 72), (15, 99),
)  # fmt: skip
# The levels of each byte, in code order.
TABLE_LEVELS = tuple(
    (mean[0] - half[0], mean[0] + half[0], mean[1] - half[1], mean[1] + half[1]) for half in HALF_WIDTHS for mean in MEANS
)
# Of four codes in a byte, the first one lowest.
SHIFTS = (0, 2, 4, 6)
# Integers of an embedding's or head's row in 8 bits, and what they are called beside its weight.
ROW_LEVEL_MAX = 127
ROW_SCALE = "scale"
HEAD_BITS = (16, 8)
# Names in a block: what an attention layer's keys and values are quantized by, and what linears read is by `input_name`.
KEYS, VALUES = "self_attn.key_cache", "self_attn.value_cache"
# What the tensors of a quantizer are called behind its name.
TENSORS = ("act_levels", "act_zero", "act_clip")
# And of centred keys one more.
CENTRE = "act_centre"
# Of clipping factors and centres as they are stored, integers that no loader casts: 2^-16.
CLIP_UNIT = 65536
# A factor far below 1 cuts every group's largest value; above 1 some levels are never used.
CLIP_RANGE = 0.1, 1.0


_EXPERT = re.compile(r"(?<=\.experts)\.\d+\.(?=\w+$)")


def input_name(unit: tuple[str, ...]) -> str:
    """Name of the quantizer of what some linears read: it belongs to the first of them, or to all experts of a block.

    ("mlp.gate_proj", "mlp.up_proj") -> "mlp.gate_proj.input"; ("mlp.experts.3.down_proj",) -> "mlp.experts.down_proj_input": few
    tokens reach one expert, and what they read is alike.
    """
    shared, experts = _EXPERT.subn(".", unit[0])
    return f"{shared}_input" if experts else f"{unit[0]}.input"


def step_size(name: str, width: int, granularity: str, group_size: int) -> int:
    """Values that share a step, of the quantizer `name`: of an input with `width` channels, or keys with `width` per head."""
    whole = granularity == "token" and name not in (KEYS, VALUES)
    return width if whole else min(group_size, width)
