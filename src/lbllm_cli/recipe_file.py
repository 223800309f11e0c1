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

from lbllm_cli.errors import UsageError
from lbllm_cli.recipe import Recipe

_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-5 as a number, which YAML 1.1 takes for a string."""


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper that puts quotes around strings that _StrictLoader would read as numbers."""


for _tool in (_StrictLoader, _StrictDumper):
    _tool.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def _mapping(loader: _StrictLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UsageError(f"line {line}: key {key!r} is read as {type(key).__name__}; put quotes around it")
        if key in seen:
            raise UsageError(f"line {line}: duplicate key `{key}`, first on line {seen[key]}; remove one of them")
        seen[key] = line
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """YAML text to plain values.

    Raises UsageError naming `where` and the line when the text is not YAML or repeats a key.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a subclass of SafeLoader
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: looks like a date or number and is none, as 2020-13-45
        raise UsageError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Reads, overrides and checks a recipe.

    overrides: `key.sub=value`, the value in YAML; lists are replaced whole.
    Raises UsageError with every mistake, each with its key path and, for unknown keys, the nearest valid name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"recipe {path} does not exist; give an existing file to --recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} cannot be read: {error}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a mapping with recipe_version, model, output, got {type(values).__name__}")
    for override in overrides or []:
        _override(values, override)
    problems: dict[str, list[str]] = defaultdict(list)
    values = _expand(values, "", problems, path.resolve().parent)
    unset = set(problems)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        # Every member of a union that was tried gives an error; at one key path they are one mistake.
        for key, message in map(_describe, error.errors()):
            if key not in unset:
                problems[key].append(message)
    if problems:
        listed = "\n".join(f"  {key}: {'; '.join(messages)}" if key else f"  {messages[0]}" for key, messages in problems.items())
        raise UsageError(f"{path}: {len(problems)} mistake{'s' if len(problems) > 1 else ''}\n{listed}")
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_StrictDumper, sort_keys=False, allow_unicode=True)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
        raise UsageError(f"override `{override}`: expected key.sub=value, for example ptq.group_size=64")
    *parents, last = key.split(".")
    for parent in parents:
        below = values.get(parent)
        if below is None:
            below = values[parent] = {}
        elif isinstance(below, str) and parent == "source":
            # `data.calibration.source` may be a plain string: overriding below it starts a mapping.
            below = values[parent] = {"source": below}
        if not isinstance(below, dict):
            raise UsageError(f"override `{override}`: `{parent}` is a {type(below).__name__}, replace it whole")
        values = below
    value = parse_yaml(text, f"override `{override}`")
    # A shell takes the quotes off `"generate:"`, and what is left is a mapping in YAML.
    values[last] = text if value == {text.removesuffix(":"): None} else value


def _expand(value: Any, path: str, problems: dict[str, list[str]], recipe_dir: Path) -> Any:
    """Replaces ${env:NAME}, ${env:NAME:-default} and ${recipe_dir} in every string."""
    if isinstance(value, dict):
        return {k: _expand(v, f"{path}.{k}" if path else k, problems, recipe_dir) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, f"{path}[{i}]", problems, recipe_dir) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name, default)
        if found is None:
            problems[path].append(f"environment variable {name} is not set; set it or write ${{env:{name}:-default}}")
            return match.group(0)
        return found

    expanded = _ENV.sub(lookup, value.replace("${recipe_dir}", str(recipe_dir)))
    if expanded == value or not _ENV.fullmatch(value):
        return expanded
    # A variable stands for what would have been written in its place: a number stays a number. Text stays as it is, also
    # where YAML would take a part of it for a comment.
    try:
        parsed = parse_yaml(expanded, path)
    except UsageError:
        return expanded
    return expanded if isinstance(parsed, str) else parsed


def _describe(error: Any) -> tuple[str, str]:
    """Key path and message for one pydantic error."""
    # Pydantic puts the member of a union that it tried into the path: `asymmetric.constrained-float`.
    location = [part for part in error["loc"] if part not in {"literal['auto']", "constrained-float"}]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if error["type"] == "extra_forbidden":
        key, valid = str(location[-1]), sorted(_fields_at(location[:-1]))
        near = difflib.get_close_matches(key, valid, n=1)
        return path, "unknown key" + (f"; did you mean `{near[0]}`?" if near else f"; valid: {', '.join(valid)}")
    if error["type"] == "missing":
        return path, "missing; this key has no default"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # written in recipe.py, with what it got
        return path, message
    return path, f"{message[:1].lower()}{message[1:]}, got {error.get('input')!r}"


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
