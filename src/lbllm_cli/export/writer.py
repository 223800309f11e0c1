"""Export: a packed folder that transformers loads through `lbllm_cli.hf`, or a dense one that anything loads."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from lbllm_cli import __version__
from lbllm_cli.core import files, interrupt
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.markdown import literal
from lbllm_cli.core.own_folders import EXPORT_FOLDER, check_own, remove_own
from lbllm_cli.models import folder as source
from lbllm_cli.models.model import LINEARS, SourceModel
from lbllm_cli.pipeline.block_loop import binarized_weights
from lbllm_cli.pipeline.checkpoint import Checkpoint, fingerprint
from lbllm_cli.pipeline.stage_record import Sha256, describe
from lbllm_cli.runtime.quantizer import format_of

# 1: weights alone. 2: with quantizers of activations, which a reader of 1 would leave out without a word.
FORMAT_VERSION = 2
# Folder of a run's export in its output folder, and the name that `eval.checkpoints` has for it.
EXPORT = "export"
RECORD = "lbllm_export.json"


def quantization_config(group_size: int, stage: str, activations: dict[str, Any] | None) -> dict[str, Any]:
    """The `quantization_config` block of a packed model's config.json. activations: an ActivationFormat's values."""
    return {
        "quant_method": "lbllm",
        "format_version": FORMAT_VERSION if activations else 1,
        **({"activations": activations} if activations else {}),
        "group_size": group_size,
        "stage": stage,
        "linears": list(LINEARS),
        "lbllm_version": __version__,
    }


def export(model: SourceModel, checkpoint: Checkpoint, target: Path, dense: bool, shard_bytes: int) -> None:
    """Writes the model folder `target`, replacing an earlier export of lbllm as a whole.

    One shard is held in memory at a time. Raises UsageError as `check_target`, or when a block file was changed since its stage
    finished.
    """
    check_target(target)
    partial, replaced = (target.with_name(target.name + tail) for tail in (".partial", ".replaced"))
    remove_own(partial, EXPORT_FOLDER)
    partial.mkdir(parents=True)
    inputs = export_inputs(checkpoint, dense, shard_bytes)
    # An unfinished export must be known for one as well, or nobody could delete it.
    files.write_json(partial / RECORD, inputs)
    source.copy_metadata(model.folder, partial)
    config = model.exported_config()
    group_size = checkpoint.record.group_size
    if not dense:
        config["quantization_config"] = quantization_config(group_size, checkpoint.stage, checkpoint.manifest.get("activations"))
    files.write_json(partial / "config.json", config)
    _write_shards(_tensors(model, checkpoint, dense), partial, shard_bytes)
    files.write_text(partial / "README.md", _card(model, checkpoint, dense, group_size))
    written = [partial / "config.json", *sorted(partial.glob("*.safetensors"))]
    files.write_json(partial / RECORD, inputs | {"files": {file.name: files.sha256(file) for file in written}})
    if target.exists():
        check_target(target)
        remove_own(replaced, EXPORT_FOLDER)
        target.rename(replaced)
    partial.rename(target)
    files.sync_folder(target.parent)
    remove_own(replaced, EXPORT_FOLDER)


def check_target(target: Path) -> None:
    """Whether `target`, and the folders beside it that an export passes through, are exports of lbllm's or not there.

    An export that was killed while it replaced another leaves that one under another name, which is deleted here. Raises
    UsageError naming the folder and what does not belong in it.
    """
    for tail in ("", ".partial", ".replaced"):
        check_own(target.with_name(target.name + tail), EXPORT_FOLDER)


def export_inputs(checkpoint: Checkpoint, dense: bool, shard_bytes: int) -> dict[str, Any]:
    """What an export depends on; equal inputs mean that it is up to date."""
    # By its bytes: another processor makes other ones of equal inputs.
    inputs = {"checkpoint": checkpoint.content, "format": "dense" if dense else "packed", "shard_bytes": shard_bytes}
    return {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(inputs), **inputs}


def up_to_date(target: Path, inputs: dict[str, Any]) -> bool:
    """Whether `target` is a finished and unchanged export of the same inputs."""
    try:
        record = files.read_json(target / RECORD)
        same = isinstance(record, dict) and {key: record.get(key) for key in inputs} == inputs
        return same and not _changed(target, _hashes(target))
    except (UsageError, FileNotFoundError):
        return False


def _changed(target: Path, hashes: dict[str, str]) -> list[str]:
    """Names of files that are gone or not what they were."""
    return [name for name, found in hashes.items() if not (target / name).exists() or files.sha256(target / name) != found]


_FileName = Annotated[str, Field(pattern=r"^(config\.json|model[-0-9of]*\.safetensors)$")]


class _Record(BaseModel):
    """What is checked of an export's record. files: hashes of its config and weight files by name."""

    model_config = ConfigDict(strict=True)

    files: Annotated[dict[_FileName, Sha256], Field(min_length=2)]


def _hashes(target: Path) -> dict[str, str]:
    """Hashes of an export's config and weight files by name, as its record has them."""
    try:
        return _Record.model_validate(files.read_json(target / RECORD)).files
    except ValidationError as error:
        reason = describe(error)
    except FileNotFoundError:
        reason = "it is not there"
    except UsageError as error:
        reason = str(error)
    raise UsageError(f"{target / RECORD} does not say what the export holds; run: lbllm export --recipe ... --force ({reason})")


def content(target: Path) -> str:
    """Hash of an export's weights and config: what a measurement of it depends on.

    The ends of its files would not do: stages that train levels leave codes as they are, and those lie there. Raises
    UsageError when its record is damaged or of an earlier version.
    """
    return fingerprint(_hashes(target))


def verify(target: Path) -> None:
    """Compares an export with its record. Raises UsageError as `content`, or naming the files that were changed since."""
    if changed := _changed(target, _hashes(target)):
        raise UsageError(f"{target}: {', '.join(changed)} changed since the export; run: lbllm export --recipe ... --force")


def _tensors(model: SourceModel, checkpoint: Checkpoint, dense: bool) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the exported model: everything outside the blocks, then block by block."""
    changed = checkpoint.read_outer()
    yield from {**model.read([name for name in model.outer_names() if name not in changed]), **changed}.items()
    for index in range(model.blocks):
        interrupt.check()
        stored = checkpoint.read_block(index)
        if dense:
            # Linears leave in the source dtype: in bfloat16 a level loses up to 2^-9 of its value.
            stored = {name: t.to(model.source_dtype()) for name, t in binarized_weights(stored, model).items()}
        taken = [name for name in model.block_names(index) if name not in stored]
        yield from {**model.read(taken), **stored}.items()


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """Safetensors shards of at most `shard_bytes` (a single larger tensor gets its own), and an index when there are several."""
    shards: list[tuple[Path, list[str]]] = []
    total = held_bytes = 0
    held: dict[str, Tensor] = {}

    def flush() -> None:
        path = folder / f"part-{len(shards):05d}"
        save_file(held, path, metadata={"format": "pt"})
        shards.append((path, list(held)))
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor.cpu().contiguous()
        held_bytes += size
        total += size
    flush()
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, 1):
        name = source.SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.sync_file(path)
        path.rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files.write_json(folder / source.INDEX, index)


def _card(model: SourceModel, checkpoint: Checkpoint, dense: bool, group_size: int) -> str:
    """Model card: what this is and how to load it."""
    name = literal(Path(os.path.abspath(model.folder)).name)
    layout = None if dense else format_of(checkpoint.manifest)
    lines = [f"# {name}, W(1+1){f'A{layout.bits}KV{layout.kv_bits}' if layout else ''}, {checkpoint.stage}", ""]
    lines.append(
        f"The linear layers of {name}'s decoder blocks are binarized to a sign bit and a bitmap bit per weight, four levels "
        f"per group of {group_size} inputs (LBLLM, arXiv 2604.19167), by lbllm {__version__}, stage `{checkpoint.stage}`. "
        f"Embeddings, {'' if checkpoint.read_outer() else 'norms, '}biases and head are those of the source model. "
        "The source model's licence applies."
    )
    lines.append("")
    if layout:
        lines += [
            f"Activations are quantized to {layout.bits} bits as it runs, keys and values to {layout.kv_bits}, in the cache too; "
            "`lbllm_cli.hf.quantize_activations(model, False)` turns that off.",
            "",
        ]
    if dense:
        lines.append("This folder holds the decoded weights: any program that reads the source model reads it.")
    else:
        code = ["```python", "import lbllm_cli.hf  # pip install lbllm-cli", "from transformers import AutoModelForCausalLM", ""]
        lines += ["Loading needs the plugin; without it transformers fails on the shape of the weights.", "", *code]
        lines += ['model = AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER")', "```"]
    return "\n".join(lines) + "\n"
