"""What a stage folder says of itself: the manifest of a finished stage, the progress file of an unfinished one.

Both lie where users can reach them; they are read here and nowhere else, and every value is checked before it is used.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.validation import describe
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.format.levels import scale_group
from lbllm_cli.format.names import LEVEL_BITS
from lbllm_cli.format.settings import Activations
from lbllm_cli.recipe.base import GroupSize
from lbllm_cli.recipe.stages import STAGES, StageName

# 1: levels of 8 bits. 2: `level_bits` says how many they have. 3: keys are centred. 5: levels of 2 bits, a scale for each row;
# under 4 their bytes named another table. 6: linears with groups of their own sizes.
FORMAT_VERSION = 6
# Tensors outside the blocks that a stage has changed; a stage that changes none has no such file.
OUTER = "outer.safetensors"
# Of the parent in the inputs of a stage: see `lineage.stage_inputs`.
PARENT = "parent.files"
# Of the ranks that make it together, where they are several: sums over them have an order of their own.
RANKS = "ranks"

Count = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def block_file(index: int) -> str:
    """File name of a block: 3 -> "block_003.safetensors"."""
    return f"block_{index:03d}.safetensors"


class _Record(BaseModel):
    """inputs: what the stage is made from, by recipe key. files: hashes of its weight files by name."""

    model_config = ConfigDict(strict=True, frozen=True)

    inputs: dict[str, str | int | float | bool | None]
    files: dict[str, Sha256]

    @property
    def blocks_done(self) -> int:
        """Block files."""
        return len(self.files.keys() - {OUTER})

    @model_validator(mode="after")
    def _first_blocks(self) -> "_Record":
        expected = {block_file(index) for index in range(self.blocks_done)}
        if strange := sorted(self.files.keys() - expected - {OUTER}):
            raise ValueError(f"files: names {strange[0][:80]!r}, expected {self.blocks_done} blocks from {block_file(0)} on")
        return self


_R = TypeVar("_R", bound=_Record)


class Progress(_Record):
    """Of an unfinished stage: its first blocks, as far as they are committed. forced: `--force` began it."""

    forced: bool = False


class Parent(BaseModel):
    """The stage that another goes on from."""

    model_config = ConfigDict(strict=True, frozen=True)

    stage: StageName
    fingerprint: str


def format_version(level_bits: int, centred: bool, own_groups: bool) -> int:
    """Of a stage's manifest: the smallest whose readers know all of it. centred: whether it has centred keys. own_groups: whether
    linears have group sizes of their own.
    """
    if own_groups:
        return 6
    if level_bits == LEVEL_BITS[2]:
        return 5
    return 3 if centred else 1 if level_bits == LEVEL_BITS[0] else 2


class Manifest(_Record):
    """Of a finished stage. tokens: that it read."""

    format_version: Literal[1, 2, 3, 5, 6]
    stage: StageName
    parent: Parent | None
    blocks: Count
    group_size: GroupSize
    group_sizes: dict[str, GroupSize] = {}
    level_bits: Literal[8, 4, 2] = 8
    parameters: Count
    binarized_parameters: Count
    tokens: Count
    activations: Activations | None = None

    @property
    def weights(self) -> tuple[GroupSizes, int]:
        """Group sizes, and bits of a level."""
        return GroupSizes(self.group_size, self.group_sizes), self.level_bits

    @property
    def scale_group(self) -> int:
        """Inputs that share a scale, 0 for all of a row, as all do where linears have group sizes of their own."""
        return scale_group(self.group_size, self.level_bits)

    @model_validator(mode="after")
    def _complete(self) -> "Manifest":
        centred = self.activations is not None and self.activations.key_centre
        if self.format_version != format_version(self.level_bits, centred, bool(self.group_sizes)):
            found = f"level_bits {self.level_bits}, key_centre {centred}" + (", group_sizes" if self.group_sizes else "")
            raise ValueError(f"{found} in format_version {self.format_version}, which says otherwise")
        if self.group_sizes and self.level_bits != LEVEL_BITS[2]:
            raise ValueError(f"group_sizes: levels have {self.level_bits} bits, expected {LEVEL_BITS[2]}")
        if self.blocks_done != self.blocks:
            raise ValueError(f"files: {self.blocks_done} blocks, expected {self.blocks}")
        if self.parent is not None and not isinstance(self.inputs.get(PARENT), str):
            raise ValueError(f"inputs: {PARENT} is missing")
        names = list(STAGES)
        if self.parent is not None and names.index(self.parent.stage) >= names.index(self.stage):
            raise ValueError(f"parent: {self.parent.stage} comes after {self.stage}")
        return self


def read_progress(file: Path, remedy: str) -> Progress:
    """The progress file of an unfinished stage.

    Raises UsageError with the reason and `remedy` where it is not what lbllm wrote, FileNotFoundError where it is not there.
    """
    return _checked(file, Progress, _read(file, remedy), remedy)


def read_manifest(file: Path, stage: str, remedy: str) -> tuple[Manifest, dict[str, Any]]:
    """The manifest of `stage` as it was checked, and as it was written. Raises as `read_progress`."""
    values = _read(file, remedy)
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise UsageError(f"{file} has format_version {version}, this lbllm reads {FORMAT_VERSION}; update lbllm")
    found = _checked(file, Manifest, values, remedy)
    if found.stage != stage:
        raise UsageError(f"{file} is damaged; {remedy} (it is the manifest of {found.stage})")
    return found, values


def _read(file: Path, remedy: str) -> Any:
    try:
        return files.read_json(file)
    except UsageError as error:
        reason = str(error).removeprefix(f"{file} ")
        raise UsageError(f"{file} is damaged; {remedy} (it {reason})") from None


def _checked(file: Path, kind: type[_R], values: Any, remedy: str) -> _R:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{file} is damaged; {remedy} ({describe(error)})") from None
