"""Where text comes from: bundled text, local files, datasets of the hub."""

import json
import lzma
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.data.hub import check_hub_name, hub_records, preset_records
from lbllm_cli.data.presets import PRESETS, alternatives
from lbllm_cli.data.records import RECORD_LIMIT, local_records
from lbllm_cli.models import chat
from lbllm_cli.recipe.text import Source

STYLES = ("novels", "technical", "modern")
PARTS = ("calibration", "training", "evaluation")
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


class TextError(UsageError):
    """What is wrong with text. key: of the recipe, that names it. reason: without the key."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


@contextmanager
def named(key: str) -> Iterator[None]:
    """Around what is done with text that a key of the recipe names: messages begin with the key."""
    try:
        yield
    except UsageError as error:
        raise TextError(key, str(error)) from None


def listed(errors: Iterable[TextError]) -> list[str]:
    """One line for each thing that is wrong, behind all keys that name it."""
    keys: dict[str, dict[str, None]] = {}
    for error in errors:
        keys.setdefault(error.reason, {})[error.key] = None
    return [f"{', '.join(found)}: {reason}" for reason, found in keys.items()]


def expand(sources: list[Source]) -> list[Source]:
    """A bundled part without a style stands for its styles in equal shares, novels first."""
    expanded: list[Source] = []
    for item in sources:
        if item.source in {f"builtin:{part}" for part in PARTS}:
            share = item.weight / len(STYLES)
            expanded += [item.model_copy(update={"source": f"{item.source}/{style}", "weight": share}) for style in STYLES]
        else:
            expanded.append(item)
    return expanded


def describe(item: Source) -> str:
    """How messages name a source."""
    return f"{item.source} ({item.path})" if item.path else item.source


def check(item: Source, evaluating: bool) -> None:
    """Everything about a source that can be checked without reading it.

    Raises UsageError with the valid names.
    """
    name = item.source
    _check_keys(item)
    if evaluating and item.repeats:
        raise UsageError(f"source {name}: repeats is for text to train on, a model is evaluated on text as it is; leave it out")
    if name.startswith("builtin:"):
        valid = [f"{part}{tail}" for part in PARTS for tail in ("", *(f"/{style}" for style in STYLES))]
        if name.removeprefix("builtin:") not in valid:
            raise UsageError(f"source {name}: no such bundled text; valid: {', '.join('builtin:' + v for v in valid)}")
    elif item.sampled and evaluating:
        raise UsageError("source generate: gives calibration text; a model cannot be evaluated on text of its own")
    elif name in PRESETS:
        if evaluating and PRESETS[name].evaluation is None:
            raise UsageError(f"source {name} has no evaluation part; choose wikitext2, ptb, c4 or a path")
        if item.path is not None:
            _existing(item.path, "path")
        elif PRESETS[name].instead:
            raise UsageError(
                f"source {name}: {PRESETS[name].repository} is gone from the Hugging Face hub; use "
                f"{' or '.join(PRESETS[name].instead)}, or `path:` with a local file of its records"
            )
    elif name.startswith("hub:"):
        check_hub_name(name.removeprefix("hub:"))
    elif not item.sampled:
        path = _existing(name, "source")
        if path.is_dir() and not ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            raise UsageError(f"source {name} is a folder but not a dataset written by save_to_disk (no state.json)")
        if not path.is_dir() and not path.name.endswith((*SUFFIXES, ".safetensors")):
            kinds = ", ".join(SUFFIXES)
            raise UsageError(f"source {name}: unknown kind {path.suffix!r}; expected {kinds}, .safetensors or a folder")


def _check_keys(item: Source) -> None:
    """Refuses keys that this kind of source does not read."""
    name = item.source
    if name.startswith("builtin:"):
        read = set()
    elif item.sampled:
        read = {"temperature"}
    elif name in PRESETS:
        read = {"path"} | ({"split"} & _local_keys(item.path, "path") if item.path else set())
    elif name.startswith("hub:"):
        read = {"text_key", "messages_key", "split", "config"}
    else:
        read = _local_keys(name, "source")
    unread = [
        key
        for key, field in Source.model_fields.items()
        if key not in {"source", "weight", "repeats", *read} and getattr(item, key) != field.default
    ]
    if unread:
        remedy = "; its parts are those of the papers, hub:NAME has others" if name in PRESETS and not item.path else ""
        raise UsageError(f"source {name} does not read {', '.join(unread)}{remedy}")


def _local_keys(name: str, key: str) -> set[str]:
    """What is read of a local file or folder. A file is its only split."""
    path = files.user_path(name, key)
    if not os.path.isfile(path):
        return {"text_key", "messages_key", "split"}
    return set() if path.suffix in {".txt", ".safetensors"} else {"text_key", "messages_key"}


def _existing(name: str, key: str) -> Path:
    path = files.user_path(name, key)
    if not os.path.exists(path):  # Path.exists raises where a folder above may not be entered
        raise UsageError(
            f"source {name}: no such file; presets: {', '.join(alternatives(None, False))}; also builtin:, generate:, hub:NAME"
        )
    if not path.is_dir():
        files.check_regular(path)
    return path


def documents(item: Source, evaluating: bool, tokenizer: Any) -> Iterator[str]:
    """Texts of a source, in order. Raises UsageError when a file or record is not what the recipe says."""
    name = item.source
    if name.startswith("builtin:"):
        part, style = name.removeprefix("builtin:").split("/")
        yield from (record["text"] for record in builtin_records(part, style))
        return
    if name in PRESETS:
        preset = PRESETS[name]
        if item.path:
            place = preset.evaluation if evaluating else preset.calibration
            assert place is not None  # `check` refused this
            records = local_records(files.user_path(item.path, "path"), item.split or place.split)
        else:
            records = preset_records(name, evaluating)
        keys = {"messages_key": preset.key} if preset.chat else {"text_key": preset.key}
        yield from _texts(records, item.model_copy(update=keys), tokenizer)
        return
    split = item.split or ("test" if evaluating else "train")
    if name.startswith("hub:"):
        yield from _texts(hub_records(name.removeprefix("hub:"), item.config, split), item, tokenizer)
    elif (path := files.user_path(name, "source")).suffix == ".txt":
        try:
            yield files.read_text(path)
        except FileNotFoundError:
            raise UsageError(f"{path} is no longer there") from None
    else:
        yield from _texts(local_records(path, split), item, tokenizer)


def parted(item: Source, texts: Iterator[str]) -> Iterator[str]:
    """Texts with what parts each from the next: an empty line; a conversation's end is the template's matter."""
    preset = PRESETS.get(item.source)
    chat = item.messages_key or (preset is not None and preset.messages_key)
    return texts if chat else (text + "\n\n" for text in texts)


def builtin_records(part: str, style: str) -> Iterator[dict[str, str]]:
    """Bundled documents: {"document": name, "text": ...}."""
    resource = package_files("lbllm_cli.data") / "text" / part / f"{style}.jsonl.xz"
    with resource.open("rb") as packed, lzma.open(packed, "rt", encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def _texts(records: Iterator[Any], item: Source, tokenizer: Any) -> Iterator[str]:
    key = item.messages_key or item.text_key
    for number, record in enumerate(records, 1):
        where = f"{describe(item)}: record {number}"
        if not isinstance(record, dict) or key not in record:
            have = ", ".join(map(str, record))[:300] if isinstance(record, dict) else type(record).__name__
            raise UsageError(f"{where} has no field `{key}`, it has: {have}; set text_key or messages_key")
        value = record[key]
        if item.messages_key:
            if not tokenizer.chat_template:
                remedy = "another preset" if item.source in PRESETS else "text_key"
                raise UsageError(f"{describe(item)}: messages_key needs a chat template and the tokenizer has none; use {remedy}")
            value = chat.render(tokenizer, value, f"{where}, field `{key}`")
        elif not isinstance(value, str):
            raise UsageError(f"{where}, field `{key}` is {type(value).__name__}, expected text")
        if len(value) > RECORD_LIMIT:
            raise UsageError(f"{where} has {len(value):,} characters; at most {RECORD_LIMIT:,} are read; divide it into several")
        files.check_unicode(value, f"{where}, field `{key}`")
        yield value
