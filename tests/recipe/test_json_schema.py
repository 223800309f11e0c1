"""The JSON schema: what recipes say is in it, and what is no recipe is not."""

import json
import re
from typing import Any

import pytest
import yaml
from conftest import ROOT

from lbllm_cli.recipe.json_schema import json_schema
from lbllm_cli.recipe.stages import STAGES

SCHEMA = json_schema()
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NUMBER = (int, float)
TYPES = {"string": str, "integer": int, "number": NUMBER, "boolean": bool, "array": list, "object": dict, "null": type(None)}
LIMITS = {
    "minimum": lambda value, limit: value >= limit,
    "maximum": lambda value, limit: value <= limit,
    "multipleOf": lambda value, limit: value % limit == 0,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "exclusiveMaximum": lambda value, limit: value < limit,
    "minItems": lambda value, limit: len(value) >= limit,
    "maxItems": lambda value, limit: len(value) <= limit,
    "minLength": lambda value, limit: len(value) >= limit,
    "maxLength": lambda value, limit: len(value) <= limit,
    "pattern": lambda value, limit: re.search(limit, value) is not None,
    "enum": lambda value, limit: value in limit,
    "const": lambda value, limit: value == limit,
}
# Whatever else stands in a schema, and says nothing about what is valid.
NOTES = {"default", "description", "title", "$schema", "$defs"}


def mistakes(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """What a value breaks of a schema, as a validator of JSON Schema would find it; of all that this schema uses."""
    known = {*LIMITS, *NOTES, "$ref", "anyOf", "type", "properties", "required", "additionalProperties", "items"}
    assert set(schema) <= known, set(schema) - known
    if "$ref" in schema:
        return mistakes(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], where)
    if "anyOf" in schema:
        tried = [mistakes(value, part, where) for part in schema["anyOf"]]
        return [] if [] in tried else min(tried, key=len)
    kind = TYPES[schema["type"]] if "type" in schema else object
    if not isinstance(value, kind) or (isinstance(value, bool) and schema.get("type") in {"integer", "number"}):
        return [f"{where}: {value!r} is no {schema['type']}"]
    found = [f"{where}: {key} {schema[key]}" for key, holds in LIMITS.items() if key in schema and not holds(value, schema[key])]
    if isinstance(value, dict):
        fields, others = schema.get("properties", {}), schema.get("additionalProperties")
        found += [f"{where}: no {key}" for key in schema.get("required", []) if key not in value]
        for key, inner in value.items():
            known_as = fields.get(key, others)
            found += mistakes(inner, known_as, f"{where}.{key}") if isinstance(known_as, dict) else [f"{where}: unknown {key}"]
    if isinstance(value, list):
        for item in value:
            found += mistakes(item, schema["items"], where)
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    assert mistakes(yaml.safe_load(path.read_text(encoding="utf-8")), SCHEMA) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("output: {dir: o}", ": no model"),
        ("{model: {path: m}, output: {dir: o}, ptq: {groupsize: 64}}", ".ptq: unknown groupsize"),
        ("{model: {path: m}, output: {dir: o}, ptq: {group_size: 8}}", ".ptq.group_size: minimum 16"),
        ("{model: {path: m}, output: {dir: o}, data: {training: {source: [7]}}}", ".data.training.source: [7] is no string"),
        ("{model: {path: m}, output: {dir: o}, eval: {checkpoints: [pqt]}}", ".eval.checkpoints: enum"),
        ("{model: {path: m}, output: {dir: o}, act_calib: {end_to_end: {skip: -1}}}", ".act_calib.end_to_end.skip: minimum 0"),
        ("{model: {path: m}, output: {dir: o}, ptq: {group_sizes: {o: wide}}}", ".ptq.group_sizes.o: 'wide' is no integer"),
        ("{model: {path: m}, output: {dir: o}, act_calib: {group_size: 24}}", ".act_calib.group_size: multipleOf 16"),
        ("{model: {path: m}, output: {dir: o}, recipe_version: 2}", ".recipe_version: const 1"),
    ],
)
def test_what_is_no_recipe_is_found(text, found):
    assert any(line.startswith(found) for line in mistakes(yaml.safe_load(text), SCHEMA)), mistakes(yaml.safe_load(text), SCHEMA)


@pytest.mark.parametrize("source", ["a.txt", {"source": "a.txt"}, ["a.txt", {"source": "b.txt", "weight": 2}]])
def test_sources_are_written_as_the_loader_reads_them(source):
    recipe = {"model": {"path": "m"}, "output": {"dir": "o"}, "data": {"training": {"source": source}}}
    assert mistakes(recipe, SCHEMA) == []


def test_stages_are_enumerated_and_every_key_is_described():
    assert set(SCHEMA["$defs"]["Export"]["properties"]["checkpoint"]["enum"]) == {"latest", *STAGES}
    assert SCHEMA["$schema"].startswith("https://json-schema.org/")
    assert SCHEMA["title"] == "lbllm recipe"
    leaves = [field for section in SCHEMA["$defs"].values() for field in section["properties"].items()]
    undescribed = [key for key, field in leaves if "description" not in field and "$ref" not in json.dumps(field)]
    assert undescribed == []
