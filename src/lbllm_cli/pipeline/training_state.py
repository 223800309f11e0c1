"""Unfinished training, kept so that a stopped stage goes on in the middle."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.runtime.backend import in_ram

_FILE = "training.safetensors"


def _digest(tensors: dict[str, Tensor], facts: str) -> str:
    """Hash of everything that a training goes on from."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TrainingState:
    """The unfinished training of a block or a phase, beside the blocks of a stage: one file of tensors, facts in its header.

    folder: the stage's .partial folder, whose inputs were compared already. minutes: between two saves.
    """

    def __init__(self, folder: Path, minutes: float):
        self.path = folder / _FILE
        self.seconds = 60 * minutes
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._last >= self.seconds

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replaces what was kept. facts: must hold `block`."""
        contiguous = in_ram(tensors)
        said = json.dumps(facts)
        metadata = {"facts": said, "sha256": _digest(contiguous, said)}
        files.write_atomic(self.path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))
        self._last = time.monotonic()

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept of block `index`, or None. The file of an earlier block, left by a crash, counts as nothing.

        Raises UsageError for a file that lbllm did not write.
        """
        if not self.path.exists():
            return None
        files.check_regular(self.path)
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                facts: Any = json.loads(metadata["facts"])
                if not isinstance(facts, dict) or type(facts.get("block")) is not int:
                    self.refuse("its header does not say of which block it is")
                if facts["block"] != index:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            # Training that an earlier lbllm has kept has no hash, and is gone on from.
            if metadata.get("sha256") not in (None, _digest(tensors, metadata["facts"])):
                self.refuse("it was changed since it was written")
            return tensors, facts
        except (SafetensorError, ValueError, KeyError, RecursionError) as error:
            self.refuse(f"{type(error).__name__}: {error}")

    def refuse(self, reason: str) -> NoReturn:
        """Raises UsageError: what was kept cannot be gone on from."""
        raise UsageError(
            f"{self.path} is damaged ({reason}); delete it and run the same command again: only the training in it is lost"
        )

    def clear(self) -> None:
        """Forgets the training of a block that is committed."""
        self.forget(self.path.parent)
        self._last = time.monotonic()

    @staticmethod
    def forget(folder: Path) -> None:
        """Forgets what was kept in a stage's folder."""
        (folder / _FILE).unlink(missing_ok=True)
