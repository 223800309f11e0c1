"""A finished stage as later ones read it; `stage_writer.py` has one at work."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.fingerprint import fingerprint
from lbllm_cli.core.headers import TensorEntry, read_header
from lbllm_cli.format.activations import ActivationFormat, format_of
from lbllm_cli.pipeline.stage_record import (
    OUTER,
    Manifest,
    block_file,
    read_manifest,
)
from lbllm_cli.recipe.stages import STAGES

MANIFEST = "lbllm_stage.json"
PROGRESS = "progress.json"


class Checkpoint:
    """A complete stage, read-only. record: its manifest, checked; manifest: as it was written.

    Raises UsageError when the folder is not complete or its manifest is damaged.
    """

    def __init__(self, output: Path, stage: str):
        self.path = output / stage
        self.stage, self.spec = stage, STAGES[stage]
        file = self.path / MANIFEST
        if not file.exists():
            state = "interrupted" if unfinished(output, stage).exists() else "not there"
            raise UsageError(f"the {stage} checkpoint in {output} is {state}; run: lbllm {self.spec.command} --recipe ...")
        self.record: Manifest
        self.manifest: dict[str, Any]
        self.record, self.manifest = read_manifest(file, stage, f"run: {self.spec.remake}")
        # As they were written: what is hashed must not depend on how it was checked.
        self.inputs: dict[str, Any] = self.manifest["inputs"]
        self.hashes: dict[str, str] = self.manifest["files"]

    @property
    def activations(self) -> ActivationFormat | None:
        """How its blocks quantize activations, if they do."""
        return format_of(self.manifest)

    @property
    def fingerprint(self) -> str:
        """Hash of what the stage was made from."""
        return fingerprint(self.inputs)

    @property
    def content(self) -> str:
        """Hash of the weight files: what a stage that goes on from here depends on."""
        return fingerprint(self.hashes)

    def block_path(self, index: int) -> Path:
        """File of a block's tensors."""
        return self.path / block_file(index)

    def verify(self) -> None:
        """Compares every weight file with the manifest.

        Raises UsageError naming the first file that is missing, was changed since, or is there and not in the manifest: norms
        that were trained would otherwise be left out.
        """
        for name, expected in self.hashes.items():
            self._verify(name, expected)
        if (self.path / OUTER).exists() and OUTER not in self.hashes:
            raise UsageError(f"{self.path / MANIFEST} is damaged (it does not name {OUTER}); run: {self.spec.remake}")

    def _verify(self, name: str, expected: str) -> None:
        file = self.path / name
        got = files.sha256(file) if file.exists() else "no file"
        if got != expected:
            raise UsageError(
                f"{file} was changed since the stage finished (expected sha256 {expected[:12]}, got {got[:12]}); "
                f"run: {self.spec.remake}"
            )

    def read_block(self, index: int) -> dict[str, Tensor]:
        """Tensors of a block, after comparing the file's hash."""
        self._verify(block_file(index), self.hashes[block_file(index)])
        return load_file(self.block_path(index))

    def read_outer(self) -> dict[str, Tensor]:
        """Tensors outside the blocks that are not the source model's; {} where all are."""
        if OUTER not in self.hashes:
            return {}
        self._verify(OUTER, self.hashes[OUTER])
        return load_file(self.path / OUTER)

    def entries(self) -> dict[str, TensorEntry]:
        """Entries of all stored tensors, from the headers. Raises UsageError naming a file that is missing or damaged."""
        remedy = f"run: {self.spec.remake}"
        return {name: entry for file in sorted(self.hashes) for name, entry in read_header(self.path / file, remedy).items()}


def complete_stages(output: Path) -> list[str]:
    """Stages of an output folder that have a manifest, in pipeline order."""
    return [stage for stage in STAGES if (output / stage / MANIFEST).exists()]


def unfinished(output: Path, stage: str) -> Path:
    """The progress file of a stage that was begun and not finished; it may not be there."""
    return output / f"{stage}.partial" / PROGRESS
