"""The teacher's last hidden states on a text: made block by block, kept on disk.

Its logits follow from them by norm and head, exactly and at the cost of one matrix product: they take less room than the
likeliest few hundred logits of every position would, and lose nothing.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lbllm_cli import files, interrupt
from lbllm_cli.checkpoint import changes, locked
from lbllm_cli.data import tokens_hash
from lbllm_cli.errors import UsageError
from lbllm_cli.model import SourceModel
from lbllm_cli.recipe import Ptq
from lbllm_cli.recipe_training import EndToEnd, Schedule
from lbllm_cli.stream import HiddenStream, advance, embed_stream

if TYPE_CHECKING:
    from lbllm_cli.report import Reporter

RECORD = "lbllm_teacher.json"
KEY = "end_to_end.teacher"
_STATES, _WRITING, _BEGUN = "states.bin", "writing.bin", "unfinished.json"
_OWN = re.compile(r"states\.bin|writing\.bin|entering_\d+\.bin|(unfinished|lbllm_teacher)\.json(\.tmp)?|\.lock")


def teacher_folder(settings: Schedule | Ptq) -> Path | None:
    """The folder that a stage's section names for the teacher's states, if it does."""
    named = settings.teacher if isinstance(settings, EndToEnd) else None
    return None if named is None else Path(named).expanduser()


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
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError
    except FileNotFoundError:
        if all(_OWN.fullmatch(entry.name) for entry in folder.iterdir()):
            return False
        raise UsageError(f"{KEY}: {folder} holds other files; give an empty folder, or one that lbllm made") from None
    except ValueError:
        raise UsageError(f"{KEY}: {folder / RECORD} is damaged; delete the folder") from None
    if changed := changes(record, states_inputs(model, tokens)):
        raise UsageError(
            f"{KEY}: {folder} holds the states of another model or text:\n{changed}\nGive another folder, or delete this one"
        )
    states, expected = folder / _STATES, _bytes(model, tokens)
    if not states.exists() or states.stat().st_size != expected:
        got = states.stat().st_size if states.exists() else "no file"
        raise UsageError(f"{KEY}: {states} is damaged (expected {expected} bytes, got {got}); delete the folder")
    return True


def _bytes(model: SourceModel, tokens: Tensor) -> int:
    return tokens.numel() * int(model.config.hidden_size) * model.dtype.itemsize


def _entering(folder: Path, index: int) -> Path:
    """States that enter block `index`; those that enter the one past the last are the result."""
    return folder / f"entering_{index:03d}.bin"


def _resumed(folder: Path, model: SourceModel, tokens: Tensor, batch_size: int) -> tuple[HiddenStream, int]:
    """States as far as an interrupted pass brought them, and the block that they enter; else the embeddings."""
    inputs, begun = states_inputs(model, tokens), folder / _BEGUN
    found = sorted(folder.glob("entering_*.bin"))
    going_on = bool(found) and begun.exists() and json.loads(begun.read_text(encoding="utf-8")) == inputs
    last = found.pop() if going_on else None
    for path in found:
        path.unlink()
    if last is not None:
        shape = (*tokens.shape, int(model.config.hidden_size))
        return HiddenStream(shape, model.dtype, last, create=False), int(last.stem.rpartition("_")[2])
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
