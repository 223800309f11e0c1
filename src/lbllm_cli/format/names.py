"""What the stored form is called and bounded by: read without torch too, by what runs an export on a CPU."""

import re

# T of an activation quantizer of up to 7 bits: with int8 levels its products are exact in integer dot products.
LATTICE_MAX = 127
# Levels of a group of weights, and bits that a file may have of each.
LEVELS = 4
LEVEL_BITS = (8, 4, 2)
# What levels of 2 bits can be, in units of their row's scale and with the sign of the code: those of the inner pair, and of the
# outer one. About what Lloyd's iteration gives for groups of 16 and 32 of two models (scripts/level_tables.py), and no matter of
# hundredths: of five tables the worst had 2 % more squared error than the best.
TABLE_LEVELS = ((4, 13, 22, 33), (41, 58, 81, 127))
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
