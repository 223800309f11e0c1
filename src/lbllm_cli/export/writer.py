"""Export: a model folder in one of the formats of `export.formats`, written and replaced as a whole."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.fingerprint import fingerprint
from lbllm_cli.core.model_folder import metadata_hash
from lbllm_cli.core.own_folders import check_own, remove_own
from lbllm_cli.core.validation import describe
from lbllm_cli.export.base import Form
from lbllm_cli.export.card import Described, model_card
from lbllm_cli.export.formats import exporter
from lbllm_cli.format.settings import format_version
from lbllm_cli.models.model import SourceModel
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.pipeline.folders import EXPORT_FOLDER
from lbllm_cli.pipeline.stage_record import Sha256

RECORD = "lbllm_export.json"
WEIGHTS = ("*.safetensors", "*.gguf")
# In a record: tokenizer, generation settings and all else that comes from the source's folder as it is.
_METADATA = "metadata"


def export(model: SourceModel, checkpoint: Checkpoint, target: Path, form: Form, about: Described) -> None:
    """Writes the model folder `target` in a format, replacing an earlier export of lbllm as a whole.

    about: for its card. One shard is held in memory at a time. Raises UsageError as `check_target`, or when a block file was
    changed since its stage finished.
    """
    check_target(target)
    partial, replaced = (target.with_name(target.name + tail) for tail in (".partial", ".replaced"))
    remove_own(partial, EXPORT_FOLDER)
    partial.mkdir(parents=True)
    inputs = export_inputs(model, checkpoint, form)
    # An unfinished export must be known for one as well, or nobody could delete it.
    files.write_json(partial / RECORD, inputs)
    exporter(form.format).write(model, checkpoint, partial, form)
    write_card(partial, model, checkpoint, form, about)
    written = sorted(file for pattern in ("config.json", *WEIGHTS) for file in partial.glob(pattern))
    files.write_json(partial / RECORD, inputs | {"files": {file.name: files.sha256(file) for file in written}})
    if target.exists():
        check_target(target)
        remove_own(replaced, EXPORT_FOLDER)
        target.rename(replaced)
    partial.rename(target)
    files.sync_folder(target.parent)
    remove_own(replaced, EXPORT_FOLDER)


def write_card(folder: Path, model: SourceModel, checkpoint: Checkpoint, form: Form, about: Described) -> None:
    """The card alone: what was measured since an export was written is in it then."""
    files.write_text(folder / "README.md", model_card(model, checkpoint, exporter(form.format), form, about))


def check_target(target: Path) -> None:
    """Whether `target`, and the folders beside it that an export passes through, are exports of lbllm's or not there.

    An export that was killed while it replaced another leaves that one under another name, which is deleted here. Raises
    UsageError naming the folder and what does not belong in it.
    """
    for tail in ("", ".partial", ".replaced"):
        check_own(target.with_name(target.name + tail), EXPORT_FOLDER)


def export_inputs(model: SourceModel, checkpoint: Checkpoint, form: Form) -> dict[str, Any]:
    """What an export depends on; equal inputs mean that it is up to date."""
    # By its bytes: another processor makes other ones of equal inputs.
    inputs: dict[str, Any] = {"checkpoint": checkpoint.content, "format": form.format, "shard_bytes": form.shard_bytes}
    if form.head_bits != 16:  # earlier versions had nothing else
        inputs["head_bits"] = form.head_bits
    # An export that an earlier version wrote is up to date still: its own number for all of them was 2.
    record = checkpoint.record
    version = max(2, format_version(record.level_bits, checkpoint.activations, form.head_bits, bool(record.group_sizes)))
    return {"format_version": version, "fingerprint": fingerprint(inputs), **inputs, _METADATA: metadata_hash(model.folder)}


def up_to_date(target: Path, inputs: dict[str, Any]) -> bool:
    """Whether `target` is a finished and unchanged export of the same inputs."""
    try:
        record = files.read_json(target / RECORD)
        if not isinstance(record, dict):
            return False
        # Of an earlier version's record nothing says which tokenizer it was: what lies there does.
        same = {_METADATA: inputs[_METADATA], **{key: record[key] for key in inputs if key in record}} == inputs
        copied = not exporter(inputs["format"]).copies or metadata_hash(target) == inputs[_METADATA]
        return same and copied and not _changed(target, _hashes(target))
    except (UsageError, FileNotFoundError):
        return False


def _changed(target: Path, hashes: dict[str, str]) -> list[str]:
    """Names of files that are gone or not what they were."""
    return [name for name, found in hashes.items() if not (target / name).exists() or files.sha256(target / name) != found]


_FileName = Annotated[str, Field(pattern=r"^(config\.json|model[-0-9of]*\.safetensors|model\.gguf)$")]


class _Record(BaseModel):
    """What is checked of an export's record. files: hashes of its config and weight files by name."""

    model_config = ConfigDict(strict=True)

    files: dict[_FileName, Sha256]

    @field_validator("files")
    @classmethod
    def _has_weights(cls, found: dict[str, str]) -> dict[str, str]:
        if "model.gguf" not in found and ("config.json" not in found or len(found) < 2):
            raise ValueError("expected config.json and weights, or model.gguf")
        return found


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
