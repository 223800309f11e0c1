"""What a stage will need, from shapes alone: device memory, RAM, disk. Printed before the start, compared with what is free.

The stages that train have theirs in `forecast_training`.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from lbllm_cli.core.errors import UsageError
from lbllm_cli.models.model import UNITS, SourceModel, block_prefix
from lbllm_cli.models.sampling import ROWS_AT_ONCE
from lbllm_cli.pipeline.reporter import GIB
from lbllm_cli.ptq.fit import expected_bits
from lbllm_cli.recipe.schema import Ptq, Recipe, TokenSet

# Resident memory of a process that has imported torch and transformers, rounded up.
PROCESS = 0.7 * GIB
# Both streams before and after a block; in RAM the quantized one's outputs take its inputs' place. A stage that goes on from
# another needs the full-precision inputs no more once it has the teacher's outputs.
_STREAMS_DISK, _STREAMS_RAM = {"ptq": 4, "distill": 3, "act-calib": 3}, {"ptq": 3, "distill": 2, "act-calib": 2}


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs; on a CPU `device` is part of the same RAM.

    streams: bytes of all hidden-state streams at once. on_disk: where these lie. written: bytes that the whole stage writes,
    where that is more than what it leaves behind. state: bytes of one unfinished training state, saved every save_minutes.
    cheaper: recipe keys that need less device memory. teacher: bytes of disk in a folder of the teacher's own.
    """

    stage: str
    device: float
    ram: float
    disk: float
    streams: float
    on_disk: bool
    written: float = 0.0
    state: float = 0.0
    save_minutes: float = 0.0
    cheaper: str = "lower runtime.batch_size"
    teacher: float = 0.0

    def line(self) -> str:
        """One line of log."""
        where = "disk" if self.on_disk else "RAM"
        written = f", writes {self.written / GIB:.1f} GiB in all" if self.written else ""
        if self.state:
            written += f", saves {self.state / GIB:.2f} GiB of training state every {self.save_minutes:g} minutes"
        return (
            f"needs about {self.device / GIB:.1f} GiB for blocks and fitting, {self.ram / GIB:.1f} GiB of RAM, "
            f"{(self.disk + self.teacher) / GIB:.1f} GiB of disk (streams in {where}: {self.streams / GIB:.1f} GiB){written}"
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


def check_disk(need: Need, output: Path, teacher: Path | None) -> None:
    """Refuses a disk that is too small for what a stage has yet to write. teacher: the folder of the teacher's states, if any.

    Raises UsageError naming the folder.
    """
    missing = {output: ("output.dir", need.disk - _size(output / f"{need.stage}.partial"))}
    if teacher is not None and need.teacher:
        missing[teacher] = ("end_to_end.teacher", need.teacher - _size(teacher))
    for folder, (key, _) in missing.items():
        together = sum(max(0, size) for other, (_, size) in missing.items() if _device(other) == _device(folder))
        free = shutil.disk_usage(_existing(folder)).free
        if together > free:
            raise UsageError(
                f"{need.stage} needs {together / GIB:.2f} GiB of disk in {folder}, {free / GIB:.2f} GiB are free; "
                f"free some, or choose another {key}"
            )


def block_bytes(model: SourceModel) -> float:
    """A block in the compute dtype."""
    return model.count(model.block_names(0)) * model.dtype.itemsize


def activation_bytes(model: SourceModel, rows: int, length: int) -> float:
    """One forward pass of a block: about six states of the hidden width and three of the intermediate one are alive."""
    config = model.config
    return rows * length * (6 * config.hidden_size + 3 * config.intermediate_size) * max(model.dtype.itemsize, 4)


def _fit_bytes(model: SourceModel, settings: Ptq) -> float:
    """Moments of the units collected together, and the work on the largest one: factor, inverse, weights, gradients."""
    shapes = {unit: [model.shapes[f"{block_prefix(0)}{name}.weight"] for name in unit] for unit in UNITS}
    kinds = (2 if settings.asymmetric != 0 else 1) * (2 if settings.asymmetric == "auto" else 1)
    squares = [4.0 * unit[0][1] ** 2 for unit in shapes.values()]
    moments = kinds * (max(squares) if settings.sequential else sum(squares))
    work = max(9 * 4.0 * unit[0][1] ** 2 + 7 * 4.0 * sum(out * inn for out, inn in unit) for unit in shapes.values())
    return moments + work


def outer_bytes(model: SourceModel) -> float:
    """Embedding as read and as computed with, the largest tensor outside the blocks."""
    return model.count(["model.embed_tokens.weight"]) * (model.dtype.itemsize + 2)


def sampling_bytes(model: SourceModel, rows: int, length: int) -> float:
    """The whole model, its 16-bit file while it is read, and keys and values of the sequences that are sampled together."""
    values = model.shapes[f"{block_prefix(0)}self_attn.v_proj.weight"][0]
    cache = 2 * model.blocks * min(rows, ROWS_AT_ONCE) * length * values
    parameters = model.count(list(model.shapes))
    return (parameters + cache) * model.dtype.itemsize + 2.0 * parameters


def checkpoint_bytes(model: SourceModel, group_size: int) -> float:
    """Bytes of a stage's block files."""
    shapes = [(shape[0], shape[1]) for shape in (model.shapes[name] for name in model.binarized_names)]
    return expected_bits(shapes, group_size) * model.count(model.binarized_names) / 8


def _streams(recipe: Recipe, one: float, in_ram: float) -> bool:
    """Whether streams go to disk: as the recipe says, or by half of the RAM that is free now."""
    if recipe.runtime.streams == "auto":
        return in_ram * one > psutil.virtual_memory().available / 2
    return recipe.runtime.streams == "disk"


def stage_need(
    stage: str, recipe: Recipe, model: SourceModel, tokens: TokenSet, device: float, kept: float = 0, state: float = 0
) -> Need:
    """Need of a stage that runs over the blocks. device: blocks and fitting. kept: streams' worth of RAM that its fit adds."""
    one = float(tokens.sequences * tokens.length * model.config.hidden_size * model.dtype.itemsize)
    in_ram = _STREAMS_RAM[stage] + kept
    on_disk = _streams(recipe, one, in_ram)
    count = _STREAMS_DISK[stage] if on_disk else in_ram
    device = max(device, outer_bytes(model))
    ram = PROCESS + (0 if on_disk else count * one) + (device if model.device.type == "cpu" else block_bytes(model))
    if any(item.source == "generate:" for item in tokens.source):
        ram = max(ram, PROCESS + sampling_bytes(model, tokens.sequences, tokens.length))
    blocks = checkpoint_bytes(model, recipe.ptq.group_size)
    written = blocks + 2 * (model.blocks + 1) * one if on_disk else 0.0
    # A state is replaced by a whole one: two exist for a moment.
    disk = blocks + (count * one if on_disk else 0) + 2 * state
    return Need(stage, device, ram, disk, count * one, on_disk, written, state, recipe.runtime.save_minutes)


def ptq_need(recipe: Recipe, model: SourceModel) -> Need:
    """Need of `lbllm ptq`."""
    tokens = recipe.data.calibration
    heads = model.shapes[f"{block_prefix(0)}self_attn.o_proj.weight"][1] / model.config.hidden_size
    passing = activation_bytes(model, min(tokens.sequences, recipe.runtime.batch_size), tokens.length)
    # Teacher, and the student's replaced weights beside it; then the fit, when no activations are alive.
    device = 2 * block_bytes(model) + passing + _fit_bytes(model, recipe.ptq)
    # In sequential order the fit keeps what both streams' attention heads gave instead of computing it again.
    need = stage_need("ptq", recipe, model, tokens, device, 2 * heads if recipe.ptq.sequential else 0)
    keys = "lower runtime.batch_size, or set ptq.sequential: true or ptq.asymmetric: 0, which hold fewer Hessians at once"
    return replace(need, cheaper=keys)


def eval_need(recipe: Recipe, model: SourceModel, segments: dict[str, int], checkpoints: int) -> Need:
    """Need of `lbllm eval` block by block.

    segments: name -> segments of an evaluation set, for those that leave it to the text. checkpoints: that are measured at once.
    """
    sizes = [(item.segments or segments.get(item.name, 0)) * item.length for item in recipe.data.evaluation]
    one = float(sum(sizes) * model.config.hidden_size * model.dtype.itemsize) * max(2, checkpoints)
    longest = max(item.length for item in recipe.data.evaluation)
    on_disk = _streams(recipe, one, 1)
    device = 3 * block_bytes(model) + activation_bytes(model, recipe.runtime.batch_size, longest)
    device = max(device, outer_bytes(model) + 5 * 256 * model.config.vocab_size * 4)
    ram = PROCESS + (0 if on_disk else one) + (device if model.device.type == "cpu" else block_bytes(model))
    return Need("eval", device, ram, one if on_disk else 0, one, on_disk)


def whole_model_need(recipe: Recipe, model: SourceModel, need: Need) -> Need:
    """Need of `lbllm eval` where lm-eval tasks or an export are measured, which take a model that is whole in memory.

    A stage is written for them as a packed export, which is deleted afterwards.
    """
    length = max(item.length for item in recipe.data.evaluation)
    whole = model.count(list(model.shapes)) * model.dtype.itemsize + activation_bytes(model, recipe.eval.batch_size, length)
    device = max(need.device, whole)
    ram = max(need.ram, PROCESS + (whole if model.device.type == "cpu" else block_bytes(model)))
    return replace(need, device=device, ram=ram, disk=need.disk + export_need(recipe, model).disk)


def export_need(recipe: Recipe, model: SourceModel) -> Need:
    """Need of `lbllm export`."""
    rest = model.count([name for name in model.shapes if name not in set(model.binarized_names)]) * 2.0
    weights = model.count(model.binarized_names) * 2.0
    disk = rest + (weights if recipe.export.format == "dense" else checkpoint_bytes(model, recipe.ptq.group_size))
    ram = PROCESS + min(recipe.export.shard_gb * 1e9, disk) + block_bytes(model)
    return Need("export", 0.0, ram, disk, 0.0, False)


def memory_warnings(need: Need, device: torch.device) -> list[str]:
    """Memory that is likely to run out, each with the keys that lower it."""
    warnings = []
    available = psutil.virtual_memory().available
    if need.ram > available:
        # Streams that are on disk already are not what takes the RAM: on a CPU that is what a GPU would hold.
        streams = "set runtime.streams: disk, or lower runtime.batch_size or the number of sequences"
        remedy = need.cheaper if need.on_disk else streams
        warnings.append(f"needs about {need.ram / GIB:.1f} GiB of RAM, {available / GIB:.1f} GiB are available; {remedy}")
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0]
        if need.device > room:
            warnings.append(
                f"needs about {need.device / GIB:.1f} GiB of device memory, {room / GIB:.1f} GiB are free; {need.cheaper}"
            )
    return warnings
