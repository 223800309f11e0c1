"""The only reader and writer of a stage folder: blocks, progress, manifest, resume and lineage.

A stage works in <output.dir>/<stage>.partial/, whose progress.json is its one commit point, and is renamed to
<output.dir>/<stage>/ when done. lbllm_stage.json, written last, lists the hash of every weight file; it holds no clock, so
that equal runs give equal bytes.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256 as _sha256
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.own_folders import STAGE, STREAMS, UNFINISHED_STAGE, check_own, remove_own
from lbllm_cli.models.folder import TensorEntry, read_header
from lbllm_cli.pipeline.stage_record import FORMAT_VERSION, OUTER, STAGES, Manifest, block_file, read_manifest, read_progress

MANIFEST = "lbllm_stage.json"
PROGRESS = "progress.json"


def command_of(stage: str) -> str:
    """The command that makes a stage: "distill-e2e" -> "distill"."""
    return stage.removesuffix("-e2e")


def remake(stage: str) -> str:
    """The command that replaces a stage, and not the one before it that the same command makes."""
    last = "" if command_of(stage) == stage else " --only end-to-end"
    return f"lbllm {command_of(stage)} --recipe ...{last} --force"


def fingerprint(inputs: dict[str, Any]) -> str:
    """Hash of everything a stage depends on."""
    return _sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """One line per input that differs, "" when none does."""
    keys = sorted(before.keys() | now.keys())
    return "\n".join(
        f"  {key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}" for key in keys if before.get(key) != now.get(key)
    )


def flatten(values: Any, prefix: str) -> dict[str, Any]:
    """Nested values to dotted keys: {"a": {"b": 1}} under "p" -> {"p.a.b": 1}."""
    if isinstance(values, dict):
        return {key: leaf for name, value in values.items() for key, leaf in flatten(value, f"{prefix}.{name}").items()}
    if isinstance(values, list):
        return {key: leaf for i, value in enumerate(values) for key, leaf in flatten(value, f"{prefix}[{i}]").items()}
    return {prefix: values}


@contextmanager
def locked(output: Path, key: str = "output.dir") -> Iterator[None]:
    """One process per folder; the lock ends with the process, however it ends. key: of the recipe that names the folder.

    Raises UsageError when another process holds it, the folder cannot be written, or its .lock is somebody else's file.
    """
    file = output / ".lock"
    try:
        output.mkdir(parents=True, exist_ok=True)
        files.check_regular(file)
        if file.is_symlink():
            raise UsageError(f"{file} is a link; lbllm keeps its lock there: move it away")
        handle: IO[str] = file.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{key} {output} cannot be written: {error.strerror}; choose another folder") from None
    with handle:
        handle.seek(0)
        owner = handle.read(100).strip()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"{key} {output} is in use by process {owner or 'unknown'}; wait for it or choose another folder"
            ) from None
        if owner and not owner.isdecimal():
            raise UsageError(f"{file} is not lbllm's, which keeps its lock there; move it away, or choose another {key}")
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


class Checkpoint:
    """A complete stage, read-only. record: its manifest, checked; manifest: as it was written.

    Raises UsageError when the folder is not complete or its manifest is damaged.
    """

    def __init__(self, output: Path, stage: str):
        self.path = output / stage
        self.stage = stage
        file = self.path / MANIFEST
        if not file.exists():
            partial = (output / f"{stage}.partial" / PROGRESS).exists()
            state = "interrupted" if partial else "not there"
            raise UsageError(f"the {stage} checkpoint in {output} is {state}; run: lbllm {command_of(stage)} --recipe ...")
        self.record: Manifest
        self.manifest: dict[str, Any]
        self.record, self.manifest = read_manifest(file, stage, f"run: {remake(stage)}")
        # As they were written: what is hashed must not depend on how it was checked.
        self.inputs: dict[str, Any] = self.manifest["inputs"]
        self.hashes: dict[str, str] = self.manifest["files"]

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
            raise UsageError(f"{self.path / MANIFEST} is damaged (it does not name {OUTER}); run: {remake(self.stage)}")

    def _verify(self, name: str, expected: str) -> None:
        file = self.path / name
        got = files.sha256(file) if file.exists() else "no file"
        if got != expected:
            raise UsageError(
                f"{file} was changed since the stage finished (expected sha256 {expected[:12]}, got {got[:12]}); "
                f"run: {remake(self.stage)}"
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
        """Entries of all blocks' tensors, from the headers."""
        return {name: entry for file in sorted(self.hashes) for name, entry in read_header(self.path / file).items()}


def complete_stages(output: Path) -> list[str]:
    """Stages of an output folder that have a manifest, in pipeline order."""
    return [stage for stage in STAGES if (output / stage / MANIFEST).exists()]


def check_stage(output: Path, stage: str, force: bool) -> None:
    """Whether the folders that a stage is about to write, replace or delete are lbllm's.

    force: a finished stage is replaced. Raises UsageError naming the folder and what does not belong in it.
    """
    final, partial = output / stage, output / f"{stage}.partial"
    check_own(partial, UNFINISHED_STAGE)
    check_own(output / f"{stage}.replaced", STAGE)
    if force or partial.exists() or not (final / MANIFEST).exists():
        check_own(final, STAGE)
    else:
        check_own(final / "streams", STREAMS)


class StageWriter:
    """Work on one stage: the .partial folder until `finish`.

    `blocks_done` blocks are committed; the stage goes on from there.
    """

    def __init__(self, output: Path, stage: str, inputs: dict[str, Any]):
        self.final = output / stage
        self.path = output / f"{stage}.partial"
        self.stage = stage
        self.inputs = inputs
        self.hashes: dict[str, str] = {}

    @property
    def blocks_done(self) -> int:
        """Committed blocks, always the first ones."""
        return len(self.hashes.keys() - {OUTER})

    def open(self, force: bool) -> bool:
        """Starts, resumes or recognises the stage; returns False when it is already complete with the same inputs.

        force: start again, discarding an unfinished run; a finished one is replaced at the end, not before.
        Raises UsageError listing the changed inputs when the folder holds another run, and as `check_stage`.
        """
        check_stage(self.final.parent, self.stage, force)
        remove_own(self._replaced, STAGE)
        manifest, progress = self.path / MANIFEST, self.path / PROGRESS
        if not force and manifest.exists() and self._inputs_of(manifest) == self.inputs:
            # Killed between the manifest and the rename.
            self.hashes = dict(read_manifest(manifest, self.stage, f"run: {remake(self.stage)}")[0].files)
            self.verify(len(self.hashes))
            self._publish()
            return False
        if not force and progress.exists():
            if self._inputs_of(progress) != self.inputs:
                self._refuse(progress, "holds an unfinished run with other inputs")
            self.hashes = dict(read_progress(progress, f"run: {remake(self.stage)}").files)
            return True
        if (self.final / MANIFEST).exists() and not force:
            if self._inputs_of(self.final / MANIFEST) != self.inputs:
                self._refuse(self.final / MANIFEST, "was made from other inputs")
            Checkpoint(self.final.parent, self.stage).verify()
            (self.final / PROGRESS).unlink(missing_ok=True)
            return False
        remove_own(self.path, UNFINISHED_STAGE)
        self.path.mkdir(parents=True)
        self._write_progress()
        return True

    def _inputs_of(self, file: Path) -> dict[str, Any]:
        """What a run in the folder was made from. Raises UsageError where its record is damaged."""
        remedy = f"run: {remake(self.stage)}"
        if file.name == MANIFEST:
            return read_manifest(file, self.stage, remedy)[0].inputs
        return read_progress(file, remedy).inputs

    def _refuse(self, file: Path, what: str) -> None:
        listed = changes(self._inputs_of(file), self.inputs)
        raise UsageError(f"{file.parent} {what}:\n{listed}\nUse another output.dir, or replace it: {remake(self.stage)}")

    def write_block(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Writes a block's tensors and reads them back; not committed before `commit`."""
        self._write(block_file(index), tensors)
        return self.read_block(index)

    def write_outer(self, tensors: dict[str, Tensor]) -> None:
        """Writes and commits tensors outside the blocks."""
        self._write(OUTER, tensors)
        self._commit(OUTER)

    def _write(self, file: str, tensors: dict[str, Tensor]) -> None:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        files.write_atomic(self.path / file, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))

    def read_block(self, index: int) -> dict[str, Tensor]:
        """Tensors of a block of this unfinished stage."""
        return load_file(self.path / block_file(index))

    def commit(self, index: int) -> None:
        """The one commit point of a block: everything it needs is on disk already.

        The hash is of the file as it lies on disk, read again.
        """
        self._commit(block_file(index))

    def _commit(self, file: str) -> None:
        self.hashes[file] = files.sha256(self.path / file)
        self._write_progress()

    def verify(self, blocks: int) -> None:
        """Compares committed blocks with their hashes before resuming on them. blocks: of the model.

        Raises UsageError naming the file.
        """
        if self.blocks_done > blocks:
            reason = f"it has {self.blocks_done} blocks, the model {blocks}"
            raise UsageError(f"{self.path / PROGRESS} is damaged; run: {remake(self.stage)} ({reason})")
        for name, expected in self.hashes.items():
            if not (self.path / name).exists() or files.sha256(self.path / name) != expected:
                raise UsageError(f"{self.path / name} was changed since it was written; start again: {remake(self.stage)}")

    def _write_progress(self) -> None:
        files.write_json(self.path / PROGRESS, {"inputs": self.inputs, "files": self.hashes})

    def finish(self, facts: dict[str, Any]) -> None:
        """Writes the manifest and renames the folder. facts: what readers need, reproducible values only."""
        manifest = {
            "format_version": FORMAT_VERSION,
            "stage": self.stage,
            "fingerprint": fingerprint(self.inputs),
            **facts,
            "inputs": self.inputs,
            "files": self.hashes,
        }
        files.write_json(self.path / MANIFEST, manifest)
        self._publish()

    def _publish(self) -> None:
        """Puts the finished folder in place; a replaced one is removed only afterwards."""
        if self.final.exists():
            check_own(self.final, STAGE)
            remove_own(self._replaced, STAGE)
            os.rename(self.final, self._replaced)
        os.rename(self.path, self.final)
        # Only now: a .partial folder without it would look like one that was never begun.
        (self.final / PROGRESS).unlink(missing_ok=True)
        files.sync_folder(self.final.parent)
        remove_own(self._replaced, STAGE)

    @property
    def _replaced(self) -> Path:
        return self.final.with_name(f"{self.stage}.replaced")
