"""The teacher's last hidden states on a text: made block by block, kept on disk.

Its logits follow from them by norm and head, exactly and at the cost of one matrix product: they take less room than the
likeliest few hundred logits of every position would, and lose nothing.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.fingerprint import changes
from lbllm_cli.core.lock import locked
from lbllm_cli.core.own_folders import foreign
from lbllm_cli.data.tokens import tokens_hash
from lbllm_cli.models.model import SourceModel
from lbllm_cli.parallel.group import Group
from lbllm_cli.pipeline.folders import NAMED_TEACHER
from lbllm_cli.pipeline.streams import HiddenStream, advance, embed_stream
from lbllm_cli.recipe.training import EndToEnd

if TYPE_CHECKING:
    from lbllm_cli.pipeline.reporter import Reporter

RECORD = "lbllm_teacher.json"
KEY = "end_to_end.teacher"
_STATES, _WRITING, _BEGUN = "states.bin", "writing.bin", "unfinished.json"


def teacher_folder(settings: EndToEnd) -> Path | None:
    """The folder that a phase's section names for the teacher's states, if it does."""
    return None if settings.teacher is None else files.user_path(settings.teacher, KEY)


def own_folder(folder: Path, group: Group) -> Path:
    """Where a rank keeps the states of its sequences: of several ranks, each has a folder of its own in the one that is named."""
    return folder if group.size == 1 else folder / f"rank{group.rank:03d}of{group.size:03d}"


def states_inputs(model: SourceModel, tokens: Tensor) -> dict[str, Any]:
    """What kept states belong to."""
    dtype = str(model.dtype).removeprefix("torch.")
    text = f"{tokens.shape[0]} x {tokens.shape[1]}, {tokens_hash(tokens)}"
    return {"model.files": model.identity(), "dtype": dtype, "tokens": text}


def check_states(folder: Path, model: SourceModel, tokens: Tensor) -> bool:
    """Whether `folder` holds the states of this model on these tokens; False where it is not there or empty.

    Raises UsageError where it holds anything else, naming what differs.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UsageError(f"{KEY}: {folder} is a file; give a folder")
    record = _record(folder / RECORD)
    if record is None:
        # Links to folders on larger disks are what this key is for.
        if reason := foreign(folder.resolve(), NAMED_TEACHER):
            raise UsageError(f"{KEY}: {folder} holds other files (it {reason}); give an empty folder, or one that lbllm made")
        return False
    if changed := changes(record, states_inputs(model, tokens)):
        raise UsageError(
            f"{KEY}: {folder} holds the states of another model or text:\n{changed}\nGive another folder, or delete this one"
        )
    states, expected = folder / _STATES, _bytes(model, tokens)
    if not states.exists() or states.stat().st_size != expected:
        got = states.stat().st_size if states.exists() else "no file"
        raise UsageError(f"{KEY}: {states} is damaged (expected {expected} bytes, got {got}); delete the folder")
    return True


def _record(path: Path) -> dict[str, Any] | None:
    """What states belong to, as a file in their folder says; None where it is not there."""
    try:
        record = files.read_json(path)
    except FileNotFoundError:
        return None
    except UsageError as error:
        raise UsageError(f"{KEY}: {path} is damaged; delete the folder ({error})") from None
    if not isinstance(record, dict):
        raise UsageError(f"{KEY}: {path} is damaged; delete the folder (expected an object, got {type(record).__name__})")
    return record


def _bytes(model: SourceModel, tokens: Tensor) -> int:
    return tokens.numel() * int(model.config.hidden_size) * model.dtype.itemsize


def _entering(folder: Path, index: int) -> Path:
    """States that enter block `index`; those that enter the one past the last are the result."""
    return folder / f"entering_{index:03d}.bin"


def _entered(path: Path) -> int | None:
    """The block that the states in a file enter, None for another file."""
    found = re.fullmatch(r"entering_(\d{3,})\.bin", path.name)
    return None if found is None else int(found[1])


def _resumed(folder: Path, model: SourceModel, tokens: Tensor, batch_size: int) -> tuple[HiddenStream, int]:
    """States as far as an interrupted pass brought them, and the block that they enter; else the embeddings."""
    inputs, begun = states_inputs(model, tokens), folder / _BEGUN
    found = [path for path in sorted(folder.iterdir()) if (number := _entered(path)) is not None and number <= model.blocks]
    going_on = bool(found) and _record(begun) == inputs and found[-1].stat().st_size == _bytes(model, tokens)
    last = found.pop() if going_on else None
    for path in found:
        path.unlink()
    if last is not None:
        shape = (*tokens.shape, int(model.config.hidden_size))
        return HiddenStream(shape, model.dtype, last, create=False), _entered(last) or 0
    stream = embed_stream(model, tokens, folder / _WRITING, batch_size)
    files.write_json(begun, inputs)
    stream.move(_entering(folder, 0))
    return stream, 0


def teacher_states(folder: Path, model: SourceModel, tokens: Tensor, batch_size: int, reporter: "Reporter") -> HiddenStream:
    """Hidden states after the last block and before the norm, [rows, length, hidden] in the model's dtype.

    tokens: int64 [rows, length]. Read from `folder` where it has them, else made and kept there; an interrupted pass goes on
    after the last block that was whole. Raises UsageError as `check_states`.
    """
    shape = (*tokens.shape, int(model.config.hidden_size))
    # Runs that share the folder must not write it at once.
    with locked(folder, KEY):
        if not check_states(folder, model, tokens):
            stream, first = _resumed(folder, model, tokens, batch_size)
            if first:
                reporter.note(f"the teacher goes on after block {first} of {model.blocks}")
            for index in range(first, model.blocks):
                interrupt.check()
                reporter.tick(f"teacher, block {index + 1}/{model.blocks}")
                # Under another name until it is whole: the name is what tells a resumed run that it is.
                outputs = stream.like(folder / _WRITING)
                advance(model.block(index), stream, outputs, model.device, batch_size)
                outputs.move(_entering(folder, index + 1))
                stream.remove()
                stream = outputs
            stream.move(folder / _STATES)
            files.write_json(folder / RECORD, states_inputs(model, tokens))
            (folder / _BEGUN).unlink()
            reporter.note(f"the teacher's last hidden states are in {folder}")
    return HiddenStream(shape, model.dtype, folder / _STATES, create=False)
