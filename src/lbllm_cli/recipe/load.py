"""Reads a recipe file: strict YAML, ${env:NAME}, dotted overrides, and all mistakes reported at once."""

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lbllm_cli.core import files
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.strict_yaml import StrictDumper, parse_yaml
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.shipped import find_recipe

_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_DIR = "${recipe_dir}"
# Whatever is meant to be one.
_VARIABLE = re.compile(r"\$\{[^}]*\}?")

_BYTES = 1 << 20  # of a recipe file
_CHARACTERS = 100_000  # of a value
_SHOWN = 200  # characters of a value or key in a message
_LINES = 50  # of mistakes in a message
_LEVELS = 12  # of an override's key; a recipe has seven


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Reads, overrides and checks a recipe.

    path: of a file, or the name of a shipped recipe. overrides: `key.sub=value`, the value in YAML; lists are replaced whole.
    Raises UsageError with every mistake, each with its key path and, for unknown keys, the nearest valid name.
    """
    path = find_recipe(files.user_path(str(path), "--recipe"))
    try:
        text = files.read_text(path, _BYTES)
    except FileNotFoundError:
        raise UsageError(f"recipe {path} does not exist; give an existing file to --recipe") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a mapping with recipe_version, model, output, got {type(values).__name__}")
    for override in overrides or []:
        _override(values, override)
    problems: dict[str, list[str]] = defaultdict(list)
    values = _bound(_expand(values, "", problems, path.resolve().parent), "", problems)
    unset = set(problems)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        # Every member of a union that was tried gives an error; at one key path they are one mistake.
        for key, message in map(_describe, error.errors()):
            if key not in unset:
                problems[key].append(message)
    if problems:
        shown = [(_shown(key), "; ".join(messages[:_LINES])) for key, messages in problems.items()]
        lines = [f"  {key}: {message}" if key else f"  {message}" for key, message in shown]
        lines[_LINES:] = [f"  and {len(lines) - _LINES:,} more"] if len(lines) > _LINES else []
        raise UsageError("\n".join([f"{path}: {len(problems)} mistake{'s' if len(problems) > 1 else ''}", *lines]))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=StrictDumper, sort_keys=False, allow_unicode=True)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    what = f"override `{_shown(override)}`"
    if not equals or not re.fullmatch(rf"[A-Za-z_]\w*(\.[A-Za-z_]\w*){{0,{_LEVELS}}}", key):
        raise UsageError(f"{what}: expected key.sub=value, for example ptq.group_size=64")
    if len(override) > _CHARACTERS:
        raise UsageError(f"{what} has {len(override):,} characters; at most {_CHARACTERS:,} are read: write it into the file")
    *parents, last = key.split(".")
    for parent in parents:
        below = values.get(parent)
        if below is None:
            below = values[parent] = {}
        elif isinstance(below, str) and parent == "source":
            # `data.calibration.source` may be a plain string: overriding below it starts a mapping.
            below = values[parent] = {"source": below}
        if not isinstance(below, dict):
            raise UsageError(f"{what}: `{parent}` is a {type(below).__name__}, replace it whole")
        values = below
    value = parse_yaml(text, what)
    # A shell takes the quotes off `"generate:"`, and what is left is a mapping in YAML.
    values[last] = text if value == {text.removesuffix(":"): None} else value


def _expand(value: Any, path: str, problems: dict[str, list[str]], recipe_dir: Path) -> Any:
    """Replaces ${env:NAME}, ${env:NAME:-default} and ${recipe_dir} in every string; notes what looks like one and is none."""
    if isinstance(value, dict):
        return {k: _expand(v, f"{path}.{k}" if path else k, problems, recipe_dir) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, f"{path}[{i}]", problems, recipe_dir) for i, v in enumerate(value)]
    if not isinstance(value, str) or len(value) > _CHARACTERS:
        return value
    if (unknown := next(filter(_is_unknown, _VARIABLE.findall(value)), None)) is not None:
        known = "${env:NAME}, ${env:NAME:-default} and ${recipe_dir}"
        problems[path].append(f"{_shown(unknown)} is no variable; there are {known}, and none within another")
        return value
    size = 0

    def lookup(match: re.Match[str]) -> str:
        nonlocal size
        name, default = match.groups()
        found = os.environ.get(name, default)
        if found is None:
            message = f"environment variable {name} is not set; set it or write ${{env:{name}:-default}}"
            if message not in problems[path]:
                problems[path].append(message)
            return match.group(0)
        size += len(found)
        return found if size <= _CHARACTERS else "." * _CHARACTERS  # too long already; `_bound` refuses it

    expanded = _ENV.sub(lookup, value.replace(_DIR, str(recipe_dir)))
    if expanded == value or not _ENV.fullmatch(value):
        return expanded
    # A variable stands for what would have been written in its place: a number stays a number. Text stays as it is, also
    # where YAML would take a part of it for a comment.
    try:
        parsed = parse_yaml(expanded, path)
    except UsageError:
        return expanded
    return expanded if isinstance(parsed, str) else parsed


def _is_unknown(found: str) -> bool:
    return found != _DIR and (_ENV.fullmatch(found) is None or "${" in found[2:])


def _bound(value: Any, path: str, problems: dict[str, list[str]]) -> Any:
    """Notes what no key may have: integers beyond 64 bits, text that is none or too long. Something short takes its place."""
    if isinstance(value, dict):
        return {k: _bound(v, f"{path}.{k}" if path else k, problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_bound(v, f"{path}[{i}]", problems) for i, v in enumerate(value)]
    if isinstance(value, int) and value.bit_length() > 63:
        problems[path].append(f"integers of at most 64 bits are read, got one of {value.bit_length() + 1} bits")
        return 0
    if isinstance(value, str):
        try:
            if len(value) > _CHARACTERS:
                raise UsageError(f"text of at most {_CHARACTERS:,} characters is read, got {len(value):,}")
            files.check_unicode(value, "the text")
        except UsageError as error:
            problems[path].append(str(error))
            return ""
    return value


def _describe(error: Any) -> tuple[str, str]:
    """Key path and message for one pydantic error."""
    # Pydantic puts the member of a union that it tried into the path: `asymmetric.constrained-float`.
    location = [part for part in error["loc"] if part not in {"literal['auto']", "constrained-float"}]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if error["type"] == "extra_forbidden":
        key, valid = str(location[-1]), sorted(_fields_at(location[:-1]))
        near = difflib.get_close_matches(key[:_SHOWN], valid, n=1)
        return path, "unknown key" + (f"; did you mean `{near[0]}`?" if near else f"; valid: {', '.join(valid)}")
    if error["type"] == "missing":
        return path, "missing; this key has no default"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # written in recipe.py, with what it got
        return path, message
    return path, f"{message[:1].lower()}{message[1:]}, got {_shown(repr(error.get('input')))}"


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _fields_at(location: list[Any]) -> set[str]:
    """Valid keys of the section at a path."""
    models: list[type[BaseModel]] = [Recipe]
    for part in location:
        if isinstance(part, str):
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [inner for field in fields for inner in _models_in(field.annotation)]
    return {name for model in models for name in model.model_fields}
