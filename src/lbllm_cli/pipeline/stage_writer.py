"""The only writer of a stage folder: blocks, progress, manifest, resume.

A stage works in <output.dir>/<stage>.partial/, whose progress.json is its one commit point, and is renamed to
<output.dir>/<stage>/ when done. lbllm_stage.json, written last, lists the hash of every weight file; it holds no clock, so
that equal runs give equal bytes.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor

from lbllm_cli.core import files
from lbllm_cli.core.errors import RunError, UsageError
from lbllm_cli.core.fingerprint import fingerprint
from lbllm_cli.core.own_folders import check_own, remove_own, remove_unwritten
from lbllm_cli.parallel.group import ALONE, Group
from lbllm_cli.pipeline.checkpoint import MANIFEST, PROGRESS, Checkpoint
from lbllm_cli.pipeline.folders import STAGE, STREAMS, UNFINISHED_STAGE
from lbllm_cli.pipeline.inputs import differences
from lbllm_cli.pipeline.stage_record import OUTER, RANKS, block_file, format_version, read_manifest, read_progress
from lbllm_cli.pipeline.training_state import digest_of
from lbllm_cli.recipe.stages import STAGES
from lbllm_cli.runtime.backend import in_ram

# What there is of a stage, of the inputs that are asked for; whole: all but the last step, which puts it in place.
Standing = Literal["finished", "whole", "unfinished", "nothing"]


def made_by_force(output: Path, stage: str) -> bool:
    """Whether a finished stage has the mark of a command with `--force` that was stopped in a later one of its stages.

    The same command again then goes on with that one.
    """
    return _forced(output / stage / PROGRESS)


def end_force(output: Path, stages: Iterable[str]) -> None:
    """Takes the mark of `made_by_force` off: the command has ended."""
    for stage in stages:
        (output / stage / PROGRESS).unlink(missing_ok=True)


def _forced(progress: Path) -> bool:
    try:
        return read_progress(progress, "").forced
    except (UsageError, FileNotFoundError):
        return False


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

    `blocks_done` blocks are committed; the stage goes on from there, and `resumes` where it was begun before. group: of ranks
    that do it together, of which the first writes and the others wait for it. more: whether its command goes on with another
    stage; one that `--force` made is then marked when it is finished, until `end_force`.
    """

    def __init__(self, output: Path, stage: str, inputs: dict[str, Any], group: Group = ALONE, more: bool = False):
        self.final = output / stage
        self.path = output / f"{stage}.partial"
        self.stage, self.spec = stage, STAGES[stage]
        self.inputs = inputs
        self.hashes: dict[str, str] = {}
        self.group = group
        self.more = more
        self.resumes = self._forced = False

    @property
    def blocks_done(self) -> int:
        """Committed blocks, always the first ones."""
        return len(self.hashes.keys() - {OUTER})

    def look(self, force: bool) -> Standing:
        """What `open` will find, without a byte written. Raises UsageError as `open`.

        Of an unfinished stage `hashes` are then what it has committed.
        """
        standing, self.hashes, self._forced = self.group.told(lambda: (self._look(force), self.hashes, self._forced))
        return standing

    def _look(self, force: bool) -> Standing:
        check_stage(self.final.parent, self.stage, force)
        manifest, progress, remedy = self.path / MANIFEST, self.path / PROGRESS, f"run: {self.spec.remake}"
        self.hashes, self._forced = {}, False
        resume = not force or self._begun_by_force()
        if resume and manifest.exists() and not self._differs(manifest):
            # Killed between the manifest and the rename.
            self.hashes = dict(read_manifest(manifest, self.stage, remedy)[0].files)
            return "whole"
        if resume and progress.exists():
            if listed := self._differs(progress):
                self._refuse(self.path, "holds an unfinished run with other inputs", listed)
            record = read_progress(progress, remedy)
            self.hashes, self._forced = dict(record.files), record.forced
            return "unfinished"
        if (self.final / MANIFEST).exists() and (not force or (self.more and _forced(self.final / PROGRESS))):
            listed = self._differs(self.final / MANIFEST)
            if listed and not force:
                self._refuse(self.final, "was made from other inputs", listed)
            return "nothing" if listed else "finished"
        return "nothing"

    def open(self, force: bool) -> bool:
        """Starts, resumes or recognises the stage; returns False when it is already complete with the same inputs.

        force: start again, discarding an unfinished run; a finished one is replaced at the end, not before. An unfinished run
        with the same inputs that was begun by force itself is gone on with: batch jobs that were stopped come as they were.
        Raises UsageError listing the changed inputs when the folder holds another run, and as `check_stage`.
        """
        begun, self.hashes, self.resumes = self.group.told(lambda: (self._open(force), self.hashes, self.resumes))
        return begun

    def _open(self, force: bool) -> bool:
        standing = self._look(force)
        remove_own(self._replaced, STAGE)
        if standing == "whole":
            self.verify(len(self.hashes))
            self._publish()
            return False
        if standing == "unfinished":
            remove_unwritten(self.path)
            self.resumes = True
            return True
        if standing == "finished":
            Checkpoint(self.final.parent, self.stage).verify()
            self._mark_done()
            return False
        remove_own(self.path, UNFINISHED_STAGE)
        self.path.mkdir(parents=True)
        self._forced = force
        self._write_progress()
        return True

    def _begun_by_force(self) -> bool:
        """Whether an unfinished run is of the same inputs, begun by `--force`, and not damaged."""
        try:
            record = read_progress(self.path / PROGRESS, "")
        except (UsageError, FileNotFoundError):
            return False
        return record.forced and not differences(self.spec, record.inputs, self.inputs) and not self._changed(record.files)

    def _changed(self, hashes: Mapping[str, str]) -> str | None:
        """The first of an unfinished run's files that is not what its hash says."""
        for name, expected in hashes.items():
            if not (self.path / name).exists() or files.sha256(self.path / name) != expected:
                return name
        return None

    def _differs(self, file: Path) -> str:
        """Inputs that a run in the folder was made from and that are others now, a line each, "" where none is.

        Of a finished one it makes no difference how many ranks made it: that changes last bits, and makes no other stage of it.
        Raises UsageError where its record is damaged.
        """
        remedy = f"run: {self.spec.remake}"
        if file.name == PROGRESS:
            return differences(self.spec, read_progress(file, remedy).inputs, self.inputs)
        made = read_manifest(file, self.stage, remedy)[0].inputs
        found, wanted = ({key: value for key, value in inputs.items() if key != RANKS} for inputs in (made, self.inputs))
        return differences(self.spec, found, wanted)

    def _refuse(self, folder: Path, what: str, listed: str) -> None:
        remedy = f"Use another output.dir, or replace it: {self.spec.remake}"
        if folder == self.path and (self.final / MANIFEST).exists() and not self._differs(self.final / MANIFEST):
            remedy = f"{self.final} is finished, with the inputs of this recipe; to keep it, delete {self.path}"
        raise UsageError(f"{folder} {what}:\n{listed}\n{remedy}")

    def write_block(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Writes a block's tensors and reads them back; not committed before `commit`.

        Every rank has them. Raises RunError where one of them has others than were written.
        """
        if self.group.first:
            self._write(block_file(index), tensors)
            stored = self.read_block(index)
        else:
            stored = in_ram(tensors)
        digests = self.group.facts(digest_of(stored))
        if other := next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None):
            raise RunError(
                f"block {index}: rank {other} computed other tensors than rank 0, which must not be; are their devices alike?"
            )
        return stored

    def write_outer(self, tensors: dict[str, Tensor]) -> None:
        """Writes and commits tensors outside the blocks."""
        if self.group.first:
            self._write(OUTER, tensors)
        self._commit(OUTER)

    def _write(self, file: str, tensors: dict[str, Tensor]) -> None:
        contiguous = in_ram(tensors)
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
        def commit() -> str:
            self.hashes[file] = files.sha256(self.path / file)
            self._write_progress()
            return self.hashes[file]

        # What it goes on from may be deleted by any rank once all know that it is committed.
        self.group.meet()
        self.hashes[file] = self.group.told(commit)

    def verify(self, blocks: int) -> None:
        """Compares committed blocks with their hashes before resuming on them. blocks: of the model.

        Raises UsageError naming the file.
        """
        if self.blocks_done > blocks:
            reason = f"it has {self.blocks_done} blocks, the model {blocks}"
            raise UsageError(f"{self.path / PROGRESS} is damaged; run: {self.spec.remake} ({reason})")
        if name := self._changed(self.hashes):
            raise UsageError(f"{self.path / name} was changed since it was written; start again: {self.spec.remake}")

    def _write_progress(self) -> None:
        forced = {"forced": True} if self._forced else {}
        files.write_json(self.path / PROGRESS, {"inputs": self.inputs, "files": self.hashes, **forced})

    def finish(self, facts: dict[str, Any]) -> None:
        """Writes the manifest and renames the folder. facts: what readers need, reproducible values only."""
        centred = facts.get("activations", {}).get("key_centre", False)
        manifest = {
            # What an earlier lbllm can read has the number that it knows.
            "format_version": format_version(facts.get("level_bits", 8), centred, "group_sizes" in facts),
            "stage": self.stage,
            "fingerprint": fingerprint(self.inputs),
            **facts,
            "inputs": self.inputs,
            "files": self.hashes,
        }

        def finish() -> None:
            files.write_json(self.path / MANIFEST, manifest)
            self._publish()

        self.group.told(finish)

    def _publish(self) -> None:
        """Puts the finished folder in place; a replaced one is removed only afterwards."""
        if self.final.exists():
            check_own(self.final, STAGE)
            remove_own(self._replaced, STAGE)
            os.rename(self.final, self._replaced)
        os.rename(self.path, self.final)
        # Only now: a .partial folder without it would look like one that was never begun.
        self._mark_done()
        files.sync_folder(self.final.parent)
        remove_own(self._replaced, STAGE)

    def _mark_done(self) -> None:
        """Deletes the progress file of a finished stage, unless it is the mark of `made_by_force`."""
        if not (self.more and _forced(self.final / PROGRESS)):
            (self.final / PROGRESS).unlink(missing_ok=True)

    @property
    def _replaced(self) -> Path:
        return self.final.with_name(f"{self.stage}.replaced")
