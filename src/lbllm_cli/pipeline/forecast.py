"""What a stage will need, from shapes alone: device memory, RAM, disk. Printed before the start, compared with what is free.

What a stage alone knows of its need is in its own package.
"""

import shutil
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

from lbllm_cli.core.console import GIB, say
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.ram import available_ram
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.format.weights import expected_bits
from lbllm_cli.models.model import SourceModel
from lbllm_cli.models.sampling import ROWS_AT_ONCE
from lbllm_cli.pipeline.plan import Plan
from lbllm_cli.pipeline.world import World
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import StageSpec

Place = Literal["device", "ram", "disk"]
# What blocks, fitting and streams may take of a GPU's free memory together: an allocator in pieces holds more than is used.
_SHARE_OF_DEVICE = 0.8
# Forecasts of device memory are at most this factor above what is used (`scripts/bench/device_counts.py`).
_TOO_HIGH = 1.15
# Resident memory of a process that has imported torch and transformers, rounded up.
PROCESS = 0.7 * GIB


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs; on a CPU `device` is part of the same RAM.

    Of one rank, the one that needs most; but disk, written and teacher are of all that write to a folder: output.dir is the same
    for all ranks, and a teacher's folder may be a machine's own, whose ranks share it. world: how many they are.

    streams: bytes of all hidden-state streams at once. place: where these lie. written: bytes that the whole stage writes,
    where that is more than what it leaves behind. state: bytes of one unfinished training state, saved every save_minutes.
    cheaper: recipe keys that need less device memory. teacher: bytes of disk in a folder of the teacher's own, teacher_folder.
    """

    stage: str
    device: float
    ram: float
    disk: float
    streams: float
    place: Place
    written: float = 0.0
    state: float = 0.0
    save_minutes: float = 0.0
    cheaper: str = "lower runtime.batch_size"
    teacher: float = 0.0
    teacher_folder: Path | None = None
    world: World = field(default_factory=World)

    def line(self) -> str:
        """One line of log."""
        where = {"device": "on the device", "ram": "in RAM", "disk": "on disk"}[self.place]
        written = f", writes {self.written / GIB:.1f} GiB in all" if self.written else ""
        if self.state:
            written += f", saves {self.state / GIB:.2f} GiB of training state every {self.save_minutes:g} minutes"
        together = ""
        if self.world.several:
            where, together = f"{where} of each", f"; {self.world}, each of which needs that much, disk is of all together"
        return (
            f"needs about {self.device / GIB:.1f} GiB for blocks and fitting, {self.ram / GIB:.1f} GiB of RAM, "
            f"{(self.disk + self.teacher) / GIB:.1f} GiB of disk (streams {where}: {self.streams / GIB:.1f} GiB)"
            f"{written}{together}"
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def _device(folder: Path) -> int:
    """The disk of a folder."""
    return _existing(folder).stat().st_dev


def _size(folder: Path) -> int:
    """Bytes of all files in a folder, 0 where it is not there."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_disk(need: Need, output: Path) -> None:
    """Refuses a disk that is too small for what a stage has yet to write. Raises UsageError naming the folder."""
    missing = {output: ("output.dir", need.disk - _size(output / f"{need.stage}.partial"))}
    if need.teacher_folder is not None and need.teacher:
        missing[need.teacher_folder] = ("end_to_end.teacher", need.teacher - _size(need.teacher_folder))
    for folder, (key, _) in missing.items():
        together = sum(max(0, size) for other, (_, size) in missing.items() if _device(other) == _device(folder))
        free = shutil.disk_usage(_existing(folder)).free
        if together > free:
            raise UsageError(
                f"{need.stage} needs {together / GIB:.2f} GiB of disk in {folder}, {free / GIB:.2f} GiB are free; "
                f"free some, or choose another {key}"
            )


def check_device(need: Need, model: SourceModel) -> None:
    """Refuses a GPU that cannot hold what a stage needs. Raises UsageError naming keys that need less."""
    backend = model.backend
    if backend.shares_ram:
        return
    free = backend.free_memory(model.device)
    if need.device / _TOO_HIGH > free:
        raise UsageError(
            f"{need.stage} needs about {need.device / GIB:.1f} GiB of device memory, {model.device} "
            f"({backend.describe(model.device)}) has {free / GIB:.1f} GiB free; {need.cheaper}"
        )


def announce(need: Need, output: Path, model: SourceModel, done: bool = False) -> None:
    """Says what is needed, after what it rules out has been refused. done: nothing is left to be written."""
    if not done:
        check_disk(need, output)
        check_device(need, model)
    say(f"{need.stage}: {need.line()}, on {model.device} in {str(model.dtype).removeprefix('torch.')}")
    for warning in memory_warnings(need, model):
        say(f"{need.stage}: warning: {warning}")


def block_bytes(model: SourceModel) -> float:
    """A block in the compute dtype."""
    return model.count(model.block_names(0)) * model.dtype.itemsize


def activation_bytes(model: SourceModel, rows: int, length: int) -> float:
    """One forward pass of a block: about six states of the hidden width and three of the intermediate one are alive."""
    config = model.config
    return rows * length * (6 * config.hidden_size + 3 * model.inner) * max(model.dtype.itemsize, 4)


def outer_bytes(model: SourceModel) -> float:
    """Embedding as read and as computed with, the largest tensor outside the blocks."""
    return model.count(["model.embed_tokens.weight"]) * (model.dtype.itemsize + 2)


def sampling_bytes(model: SourceModel, rows: int, length: int) -> float:
    """The whole model, its 16-bit file while it is read, and keys and values of the sequences that are sampled together."""
    cache = 2 * model.blocks * min(rows, ROWS_AT_ONCE) * length * model.kv_width
    parameters = model.count(list(model.shapes))
    return (parameters + cache) * model.dtype.itemsize + 2.0 * parameters


def checkpoint_bytes(model: SourceModel, sizes: GroupSizes, level_bits: int) -> float:
    """Bytes of a stage's block files."""
    # All blocks are alike where no linear has a size of its own.
    blocks = range(model.blocks if sizes.others else 1)
    bits = sum(
        expected_bits([shape], sizes.of(block, name), level_bits) * prod(shape)
        for block in blocks
        for name, shape in model.linear_shapes.items()
    )
    return bits * (model.blocks / len(blocks)) / 8


def streams_place(recipe: Recipe, model: SourceModel, device: float, alive: float, ranks: int = 1) -> Place:
    """Where streams go: as the recipe says, or by what is free now. device: bytes of blocks and fitting. alive: of streams.

    ranks: that share a machine's RAM, each with as many.
    """
    wanted, backend = recipe.runtime.streams, model.backend
    if backend.shares_ram:
        wanted = "ram" if wanted == "device" else wanted
    elif wanted == "auto" and device + alive < _SHARE_OF_DEVICE * backend.free_memory(model.device):
        return "device"
    if wanted != "auto":
        return wanted
    return "disk" if ranks * alive > available_ram() / 2 else "ram"


def host_bytes(model: SourceModel, device: float, state: float = 0) -> float:
    """RAM of a process whose device holds `device` bytes: on a CPU these, elsewhere a block on its way there, and the state of an
    unfinished training on its way to disk or back: what a block was pinned for stays so."""
    return PROCESS + (device if model.backend.shares_ram else block_bytes(model) + state)


def stage_need(
    plan: Plan, spec: StageSpec, device: float, kept: float = 0, state: float = 0, states: float | None = None
) -> Need:
    """Need of a stage that runs over the blocks. device: blocks and fitting. kept: streams' worth of RAM that its fit adds.

    state: bytes of one unfinished training state, of the rank that has most. states: of all ranks' together, default that one.
    """
    recipe, model, tokens, world = plan.recipe, plan.model, plan.token_set(spec), plan.world
    sequences = plan.settings(spec).subset or tokens.sequences
    row = tokens.length * model.config.hidden_size * model.dtype.itemsize
    one, every = float(world.most(sequences) * row), float(sequences * row)
    stored, alive = spec.streams
    device = max(device, outer_bytes(model))
    place = streams_place(recipe, model, device, (alive + kept) * one, world.node)
    count = stored if place == "disk" else alive + kept
    ram = host_bytes(model, device, state) + (count * one if place == "ram" else 0)
    device += count * one if place == "device" else 0
    if any(item.sampled for item in tokens.source):
        whole = sampling_bytes(model, sequences, tokens.length)
        ram = max(ram, PROCESS + whole)
        # On a GPU the file stays in RAM.
        device = device if model.backend.shares_ram else max(device, whole - 2.0 * model.count(list(model.shapes)))
    blocks = checkpoint_bytes(model, model.group_sizes(recipe.ptq), recipe.ptq.level_bits)
    written = blocks + 2 * (model.blocks + 1) * every if place == "disk" else 0.0
    # A state is replaced by a whole one: two exist for a moment.
    disk = blocks + (count * every if place == "disk" else 0) + 2 * (state if states is None else states)
    return Need(
        spec.name, device, ram, disk, count * one, place, written, state, recipe.runtime.save_minutes, world=world
    )  # fmt: skip


def memory_warnings(need: Need, model: SourceModel) -> list[str]:
    """Memory that is likely to run out, each with the keys that lower it."""
    warnings = []
    available, ranks = available_ram(), need.world.node
    if ranks * need.ram > available:
        # Streams that are on disk already are not what takes the RAM: on a CPU that is what a GPU would hold.
        streams = "set runtime.streams: disk, or lower runtime.batch_size or the number of sequences"
        remedy = need.cheaper if need.place == "disk" else streams
        several = f" for {ranks} ranks of a machine" if ranks > 1 else ""
        needed = f"needs about {ranks * need.ram / GIB:.1f} GiB of RAM{several}"
        warnings.append(f"{needed}, {available / GIB:.1f} GiB are available; {remedy}")
    if not model.backend.shares_ram:
        room = model.backend.free_memory(model.device)
        if need.device > room:
            warnings.append(
                f"needs about {need.device / GIB:.1f} GiB of device memory, {room / GIB:.1f} GiB are free; {need.cheaper}"
            )
    return warnings
