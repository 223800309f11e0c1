"""The schema of recipes as editors read it."""

import json
from typing import Any

from lbllm_cli.recipe.schema import Recipe

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe as it is written: a source may be its name alone, and one source stands for a list of one."""
    schema = Recipe.model_json_schema(by_alias=True)
    source = {"anyOf": [{"type": "string", "description": "what `source` says"}, {"$ref": "#/$defs/Source"}]}
    _as_written(schema, source)
    return {"$schema": _DIALECT, **schema, "title": "lbllm recipe"}


def _as_written(value: Any, source: dict[str, Any]) -> None:
    """Lets every list of sources be a list of names and sources, or one of them."""
    if isinstance(value, list):
        for item in value:
            _as_written(item, source)
    elif isinstance(value, dict):
        for item in value.values():
            _as_written(item, source)
        if value.get("items") == {"$ref": "#/$defs/Source"}:
            found = {key: value.pop(key) for key in ("type", "items", "minItems")}
            value["anyOf"] = [*source["anyOf"], {**found, "items": source}]


def schema_text() -> str:
    """The schema as it is kept and printed."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
