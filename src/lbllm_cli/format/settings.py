"""What files say of the stored form: `quantization_config` of a packed model, activations in manifests."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lbllm_cli import __version__
from lbllm_cli.core.validation import describe
from lbllm_cli.format.group_sizes import SIZE_MAX, GroupSizes, is_group_size
from lbllm_cli.format.names import HEAD_BITS, LEVEL_BITS

if TYPE_CHECKING:
    from lbllm_cli.format.activations import ActivationFormat

METHOD = "lbllm"
_GROUP_SIZE = f"a multiple of 16 up to {SIZE_MAX}"
_LINEAR = re.compile(r"layers\.\d{1,5}\.(.+)")
# 1: weights alone. 2: with quantizers of activations, which a reader of 1 would leave out without a word. 3: levels of 4 bits,
# with quantizers or without. 4: centred keys. 5: embedding and head of 8 bits. 7: levels of 2 bits, with a scale for each row;
# under 6 their bytes named another table. 8: linears with groups of their own sizes.
FORMAT_VERSION = 8
# Families of which vLLM makes the embedding without asking how it is quantized: 8 bits of it are none that it can read.
DENSE_ROWS = ("gemma2", "mixtral", "gpt_oss", "granitemoe")


class Activations(BaseModel):
    """What may be in the place of an `ActivationFormat` in a file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    bits: Annotated[int, Field(ge=3, le=8)]
    kv_bits: Annotated[int, Field(ge=3, le=8)]
    granularity: Literal["group", "token"]
    form: Literal["knee", "uniform"]
    kv_form: Literal["knee", "uniform"]
    tables: Annotated[int, Field(ge=1, le=2)]
    group_size: Annotated[int, Field(ge=16, le=4096)]
    key_centre: bool = False


def quantization_config(
    sizes: GroupSizes, level_bits: int, stage: str, linears: tuple[str, ...], activations: "ActivationFormat | None",
    head_bits: int = 16,
) -> dict[str, Any]:  # fmt: skip
    """The `quantization_config` block of a packed model's config.json.

    linears: of a block, that are packed. head_bits: of embedding and head, 16 for as the source has them.
    """
    return {
        "quant_method": METHOD,
        "format_version": format_version(level_bits, activations, head_bits, bool(sizes.others)),
        **({"level_bits": level_bits} if level_bits != 8 else {}),
        **({"head_bits": head_bits} if head_bits != 16 else {}),
        **({"activations": activations.as_dict()} if activations else {}),
        "group_size": sizes.size,
        **sizes.as_dict(),
        "stage": stage,
        "linears": list(linears),
        "lbllm_version": __version__,
    }


def format_version(
    level_bits: int, activations: "ActivationFormat | None", head_bits: int = 16, own_groups: bool = False
) -> int:  # fmt: skip
    """Of a packed model: the smallest whose readers know all of it. own_groups: whether linears have group sizes of their own."""
    if own_groups:
        return 8
    if level_bits == LEVEL_BITS[2]:
        return 7
    if head_bits != 16:
        return 5
    if activations is not None and activations.key_centre:
        return 4
    return 3 if level_bits != 8 else 2 if activations else 1


def check_settings(values: dict[str, Any]) -> None:
    """Raises ValueError naming the first value of a packed model's `quantization_config` that this lbllm cannot read."""

    def check(key: str, good: bool, expected: str, got: Any) -> None:
        if not good:
            raise ValueError(f"quantization_config.{key}: expected {expected}, got {str(got)[:80]}; export it again")

    version, size, linears = values.get("format_version"), values.get("group_size"), values.get("linears")
    check("format_version", type(version) is int and version > 0, f"1 to {FORMAT_VERSION}", version)
    assert isinstance(version, int)
    if version > FORMAT_VERSION:
        raise ValueError(f"packed format_version {version}, this lbllm reads {FORMAT_VERSION}; update lbllm-cli")
    check("group_size", is_group_size(size), _GROUP_SIZE, size)
    names = linears if isinstance(linears, list) else []
    good = bool(names) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    check("linears", good, "the linears of a block", linears)
    bits = values.get("level_bits", 8)
    check("level_bits", type(bits) is int and bits in LEVEL_BITS, "8, 4 or 2", bits)
    least = format_version(bits, None)
    check("format_version", version >= least, f"{least} or more where levels have {bits} bits", version)
    head = values.get("head_bits", 16)
    check("head_bits", type(head) is int and head in HEAD_BITS, "8 or 16", head)
    check("format_version", head == 16 or version >= 5, "5 where embedding and head have 8 bits", version)
    _check_group_sizes(values, check)
    layout = values.get("activations")
    if layout is None:
        return
    check("activations", isinstance(layout, dict), "a mapping", layout)
    check("format_version", version != 1, "2 or more where there are activations", version)
    try:
        Activations.model_validate(layout)
    except ValidationError as error:
        raise ValueError(f"quantization_config.activations.{describe(error)}; export it again") from None
    check("format_version", not layout.get("key_centre") or version >= 4, "4 or more where keys are centred", version)
    step, free = layout["group_size"], bits == LEVEL_BITS[2]
    expected = "a multiple of 16" if free else f"that of the weights, {size}"
    check("activations.group_size", step == size or (free and step % 16 == 0), expected, step)


def _check_group_sizes(values: dict[str, Any], check: Callable[[str, bool, str, Any], None]) -> None:
    """Of linears that have their own."""
    sizes = values.get("group_sizes")
    if sizes is None:
        return
    check("group_sizes", isinstance(sizes, dict) and bool(sizes), "group sizes by linear", sizes)
    version, bits, where = values["format_version"], values.get("level_bits"), "where linears have group sizes of their own"
    check("format_version", version >= 8, f"8 {where}", version)
    check("level_bits", bits == LEVEL_BITS[2], f"2 {where}", bits)
    for name, size in sizes.items():
        place = _LINEAR.fullmatch(name) if isinstance(name, str) else None
        check("group_sizes", place is not None and place[1] in values["linears"], "the linears of a block", name)
        check(f"group_sizes.{name}", is_group_size(size), _GROUP_SIZE, size)


def group_sizes(values: dict[str, Any]) -> GroupSizes:
    """Of a packed model's `quantization_config`, or of a manifest, that has been checked."""
    return GroupSizes(values["group_size"], values.get("group_sizes") or {})
