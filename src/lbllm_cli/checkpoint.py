"""The only reader and writer of a stage folder: blocks, progress, manifest, resume and lineage.

A stage works in <output.dir>/<stage>.partial/, whose progress.json is its one commit point, and is renamed to
<output.dir>/<stage>/ when done. lbllm_stage.json, written last, lists the hash of every weight file; it holds no clock, so
that equal runs give equal bytes.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256 as _sha256
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lbllm_cli import files
from lbllm_cli.errors import UsageError
from lbllm_cli.source import TensorEntry, read_header

MANIFEST = "lbllm_stage.json"
PROGRESS = "progress.json"
FORMAT_VERSION = 1
STAGES = ("ptq", "distill", "distill-e2e", "act-calib", "act-calib-e2e")
# Tensors outside the blocks that a stage has changed; a stage that changes none has no such file.
OUTER = "outer.safetensors"


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

    Raises UsageError when another process holds it, or the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle: IO[str] = (output / ".lock").open("a+")
    except OSError as error:
        raise UsageError(f"{key} {output} cannot be written: {error.strerror}; choose another folder") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise UsageError(f"{key} {output} is in use by process {owner}; wait for it or choose another folder") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


class Checkpoint:
    """A complete stage, read-only.

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
        try:
            self.manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            self.inputs: dict[str, Any] = self.manifest["inputs"]
            self.hashes: dict[str, str] = self.manifest["files"]
            version = self.manifest["format_version"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{file} is damaged; run: {remake(stage)}") from None
        if version != FORMAT_VERSION:
            raise UsageError(f"{file} has format_version {version}, this lbllm reads {FORMAT_VERSION}; update lbllm")

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

        Raises UsageError naming the first file that is missing or was changed since.
        """
        for name, expected in self.hashes.items():
            self._verify(name, expected)

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


def block_file(index: int) -> str:
    """File name of a block: 3 -> "block_003.safetensors"."""
    return f"block_{index:03d}.safetensors"


def complete_stages(output: Path) -> list[str]:
    """Stages of an output folder that have a manifest, in pipeline order."""
    return [stage for stage in STAGES if (output / stage / MANIFEST).exists()]


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
        Raises UsageError listing the changed inputs when the folder holds another run.
        """
        shutil.rmtree(self._replaced, ignore_errors=True)
        if self._same(self.path / MANIFEST) and not force:
            self._publish()  # killed between the manifest and the rename
            return False
        if self._same(self.path / PROGRESS) and not force:
            self.hashes = json.loads((self.path / PROGRESS).read_text(encoding="utf-8"))["files"]
            return True
        if not force and (self.path / PROGRESS).exists():
            self._refuse(self.path / PROGRESS, "holds an unfinished run with other inputs")
        if (self.final / MANIFEST).exists() and not force:
            if not self._same(self.final / MANIFEST):
                self._refuse(self.final / MANIFEST, "was made from other inputs")
            Checkpoint(self.final.parent, self.stage).verify()
            (self.final / PROGRESS).unlink(missing_ok=True)
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self._write_progress()
        return True

    def _same(self, file: Path) -> bool:
        return file.exists() and self._inputs_of(file) == self.inputs

    def _inputs_of(self, file: Path) -> dict[str, Any]:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            inputs: dict[str, Any] = record["inputs"]
            blocks: dict[str, str] = record["files"]
        except (ValueError, KeyError, TypeError, OSError):
            return {}
        return inputs if isinstance(blocks, dict) else {}

    def _refuse(self, file: Path, what: str) -> None:
        before = self._inputs_of(file)
        listed = changes(before, self.inputs) or "  (its record is damaged)"
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

    def verify(self) -> None:
        """Compares committed blocks with their hashes before resuming on them. Raises UsageError naming the file."""
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
            shutil.rmtree(self._replaced, ignore_errors=True)
            os.rename(self.final, self._replaced)
        os.rename(self.path, self.final)
        # Only now: a .partial folder without it would look like one that was never begun.
        (self.final / PROGRESS).unlink(missing_ok=True)
        files.sync_folder(self.final.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)

    @property
    def _replaced(self) -> Path:
        return self.final.with_name(f"{self.stage}.replaced")
