"""What two records say that a stage was made from: whether it is the same, and which keys of a recipe to change where it is not.

Text is recorded under no key of a recipe, as its shape and hash: "32 x 512, 1f3a...". Of text that is still to be sampled the
shape alone is known, "32 x 512", and that is compared.
"""

import re
from typing import Any

from lbllm_cli.core.fingerprint import changes
from lbllm_cli.recipe.stages import TABLE, StageSpec


def text_key(spec: StageSpec) -> str:
    """What a stage's text is recorded under."""
    return f"{spec.text}.tokens"


def text_entry(shape: tuple[int, ...], digest: str | None) -> str:
    """What is recorded of a text. shape: sequences and their length. digest: None where the text is not known yet."""
    return f"{shape[0]} x {shape[1]}" + ("" if digest is None else f", {digest}")


def differences(spec: StageSpec, made: dict[str, Any], wanted: dict[str, Any]) -> str:
    """One line for each key by which a record is not what is wanted, "" where it is the same.

    Of text these are the keys that choose it. Its hash is told where nothing else says why it is another.
    """
    made, key = _as_known(spec, made, wanted), text_key(spec)
    shapes = [_shape(inputs.get(key)) for inputs in (made, wanted)]
    if made.get(key) == wanted.get(key) or None in shapes:
        return changes(made, wanted)
    before, now = ({name: value for name, value in inputs.items() if name != key} for inputs in (made, wanted))
    own = f"{spec.section}.sequences"
    divided = any(inputs.get(own) is not None for inputs in (made, wanted))
    # Another input of the stage says how many sequences it reads, or the key of its text does.
    numbers = (own if divided else f"{spec.text}.sequences", f"{_part_of(spec)}.length")
    for inputs, shape in zip((before, now), shapes, strict=True):
        inputs |= {name: number for name, number in zip(numbers, shape or (), strict=False) if name not in inputs}
    # With a sequence more every one may be another: what else is shows when as many are read.
    if all(before.get(name) == now.get(name) for name in ("runtime.seed", *numbers)):
        before[_text_keys(spec, divided)], now[_text_keys(spec, divided)] = made[key], wanted[key]
    return changes(before, now)


def _as_known(spec: StageSpec, made: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """A record, of text as much of it as is known of the text that is wanted."""
    key = text_key(spec)
    known = key in wanted and str(made.get(key)).startswith(f"{wanted[key]}, ")
    return {**made, key: wanted[key]} if known else made


def _shape(entry: Any) -> tuple[int, int] | None:
    """Sequences and their length, of what is recorded of a text; None of anything else."""
    found = re.match(r"(\d+) x (\d+)(,|$)", str(entry))
    return None if found is None else (int(found[1]), int(found[2]))


def _part_of(spec: StageSpec) -> str:
    """The part of `data` that a stage reads, or that its end-to-end phase takes source and length of."""
    return next(other.text for other in TABLE if other.command == spec.command)


def _text_keys(spec: StageSpec, divided: bool) -> str:
    """What chooses a stage's text and is no input by itself. divided: whether it reads some of the sequences of its part."""
    part = _part_of(spec)
    if spec.end_to_end:
        return f"{spec.section}.source, {spec.section}.skip, {part} or the tokenizer"
    return f"{part}.source, {f'{part}.sequences, ' if divided else ''}{part}.bos or the tokenizer"
