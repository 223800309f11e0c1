"""Unfinished training, kept so that a stopped stage goes on in the middle."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.parallel.group import ALONE, Group
from lbllm_cli.runtime.backend import in_ram

# Names that begin so are of what every rank has alike: parameters that it has a copy of, and the best epoch's tensors.
ALIKE = ("copy.", "best/")


def digest_of(tensors: dict[str, Tensor], facts: str = "") -> str:
    """Hash of tensors in RAM and what is said of them."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TrainingState:
    """The unfinished training of a block or a phase, beside the blocks of a stage: one file of tensors, facts in its header.

    folder: the stage's .partial folder, whose inputs were compared already. minutes: between two saves. group: of ranks, each of
    which keeps what it has.
    """

    def __init__(self, folder: Path, minutes: float, group: Group = ALONE):
        self.folder, self.group = folder, group
        self.next, self.path = self._paths(group.rank)
        self.seconds = 60 * minutes
        self._last = time.monotonic()
        self._read = self.path

    def _paths(self, rank: int) -> tuple[Path, Path]:
        """What a rank keeps until all have theirs, and what it has kept."""
        name = "training" if self.group.size == 1 else f"training.{rank:03d}"
        return self.folder / f"{name}.next.safetensors", self.folder / f"{name}.safetensors"

    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._last >= self.seconds

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replaces what was kept. facts: must hold `block`, `epoch` and `step`."""
        contiguous = in_ram(tensors)
        said = json.dumps(facts)
        metadata = {"facts": said, "sha256": digest_of(contiguous, said)}
        files.write_atomic(self.next, lambda temporary: save_file(contiguous, temporary, metadata=metadata))
        # Until all ranks have theirs, what is gone on from is what all had before.
        self.group.meet()
        os.replace(self.next, self.path)
        self._last = time.monotonic()

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept of block `index`, or None: the last that all ranks have. The file of an earlier block, left by a crash,
        counts as nothing.

        Raises UsageError for a file that lbllm did not write.
        """
        found = self._found(self.group.rank, index)
        places = self.group.facts(list(found))
        last = max(set(places[0]).intersection(*places[1:]), default=None)
        if last is None:
            return None
        path, tensors, facts = found[last]
        if not self.group.first:
            # What all have alike is kept by the first rank alone.
            _, its, _ = self._found(0, index)[last]
            tensors |= {name: tensor for name, tensor in its.items() if name.startswith(ALIKE)}
        # Only once all have read: the next save writes over what was not yet the last of all.
        self.group.meet()
        if path == self.next:
            os.replace(self.next, self.path)
        self.next.unlink(missing_ok=True)
        return tensors, facts

    def _found(self, rank: int, index: int) -> dict[tuple[int, int], tuple[Path, dict[str, Tensor], dict[str, Any]]]:
        """What a rank has kept of block `index`, by how far its training is: one file, or two where a save was cut off."""
        kept = [(path, self._load(path, index)) for path in reversed(self._paths(rank))]
        return {_place(found[1]): (path, *found) for path, found in kept if found is not None}

    def _load(self, path: Path, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not path.exists():
            return None
        files.check_regular(path)
        self._read = path
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                facts: Any = json.loads(metadata["facts"])
                if not isinstance(facts, dict) or type(facts.get("block")) is not int:
                    self.refuse("its header does not say of which block it is")
                if facts["block"] != index:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            # Training that an earlier lbllm has kept has no hash, and is gone on from.
            if metadata.get("sha256") not in (None, digest_of(tensors, metadata["facts"])):
                self.refuse("it was changed since it was written")
            return tensors, facts
        except (SafetensorError, ValueError, KeyError, RecursionError) as error:
            self.refuse(f"{type(error).__name__}: {error}")

    def refuse(self, reason: str) -> NoReturn:
        """Raises UsageError: what was kept cannot be gone on from."""
        raise UsageError(
            f"{self._read} is damaged ({reason}); delete it and run the same command again: only the training in it is lost"
        )

    def clear(self) -> None:
        """Forgets the training of a block that is committed."""
        for path in (self.next, self.path):
            path.unlink(missing_ok=True)
        self._last = time.monotonic()

    @staticmethod
    def forget(folder: Path) -> None:
        """Forgets what was kept in a stage's folder, of all ranks."""
        for path in folder.glob("training*.safetensors"):
            path.unlink(missing_ok=True)


def _place(facts: dict[str, Any]) -> tuple[int, int]:
    """How far a training is; whether these are numbers is checked with all else."""
    epoch, step = (value if type(value) is int else 0 for value in (facts.get("epoch"), facts.get("step")))
    return epoch, step
