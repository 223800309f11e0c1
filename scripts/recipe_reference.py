"""Writes docs/recipe.md, every key of the recipe, and recipes/recipe.schema.json, the same for editors, from the schema.

    python scripts/recipe_reference.py             write them
    python scripts/recipe_reference.py --check     exit code 1 where one is not what the schema says
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lbllm_cli.recipe.json_schema import schema_text
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.shipped import SCHEMA
from lbllm_cli.recipe.stages import NOT_IN_FINGERPRINT

ROOT = Path(__file__).parents[1]
PAGE, SCHEMA_FILE = ROOT / "docs" / "recipe.md", ROOT / "recipes" / SCHEMA
_INTRODUCTION = """\
<!-- Written by scripts/recipe_reference.py; change the schema, not this page. -->

# The recipe

One YAML file serves all commands of a run. Only `model.path` and `output.dir` have no default. Unknown keys, duplicate keys,
wrong types and values out of range are errors, all reported at once. `null` means that nothing is given, where a key's default
is `null` and of a section: one without keys has its defaults, an `end_to_end` without keys is none; `end_to_end: {}` is one with
its defaults.

- `lbllm init MODEL` writes one that fits the machine that it is run on; see [below](#a-recipe-for-a-model).
- `--recipe` takes a file, or the name of a recipe that comes with lbllm: `--recipe llama2-7b`; `lbllm config --list` has them.
- `lbllm config --recipe FILE` prints a recipe with all defaults; `lbllm config --schema` the JSON schema, for editors.
- Behind any command, `key.sub=value` overrides a key: `ptq.group_size=64`. A list is replaced whole. Every command of a run
  needs the same keys, since a stage goes on only from one that was made with them; `lbllm config --recipe FILE KEY=VALUE >
  mine.yaml` writes them down.
- `${env:NAME}`, `${env:NAME:-default}` and `${recipe_dir}`, the folder of the recipe, are replaced in values; anything else in
  `${...}` is an error.
- Relative paths, of a model, text, tasks or a folder that is written, start from the folder in which a command is run, not from
  that of the recipe; `${recipe_dir}/text.txt` lies beside the recipe. `~` is the home folder.
"""
_INIT = """
## A recipe for a model

```sh
lbllm init Qwen/Qwen3-8B                      # writes qwen3-8b.yaml here
lbllm init ./my-model -o recipes/mine.yaml    # of a folder, into a file of another name
```

`init` reads the model's configuration and tokenizer, asks what is free (device memory, RAM, disk) and begins with generous
settings: 1,024 sequences of 2,048 tokens and both end-to-end phases on a GPU, less text of 512 tokens on a CPU. Where a forecast
does not fit, it lowers what costs least: hidden states go to RAM, then to disk; text that the model samples is left out; fewer
sequences pass at once; phases, the asymmetric target, sequences and their length follow. Every value that was lowered has the
reason behind it. What fits with no settings is refused, stage by stage, and no file is written. Groups are of 16 weights with
levels of 2 bits, about 2.5 bits a weight; with `ptq.group_size=32` it is about 2.25. Keys that a recipe leaves out are the
paper's: groups of 128 with levels of 8 bits, 2.375.

Blocks are computed in `bfloat16` on a GPU and on a CPU with instructions for it (`avx512_bf16` or `amx_bf16` in `lscpu`), in
`float32` on other CPUs. The run goes to `runs/<name>`, or beside the model's folder where it would lie in that.

Text is `fineweb-edu`, samples of the model, and `ultrachat` where the tokenizer has a chat template. On a CPU only models below a
billion parameters sample text. A file that is there already is replaced with `--force` alone.

The first line of a recipe, `# yaml-language-server: $schema=...`, names the JSON schema: editors with that language server then
complete keys and mark mistakes. `init` names `recipe.schema.json` where that lies beside the recipe, and else the installed
schema; `lbllm config --schema` prints it.
"""
# Lines of a table cannot be broken.
_SOURCES = """
| `source` | text |
|---|---|
| `builtin:calibration`, `builtin:training`, `builtin:evaluation` | bundled: novels, technical and modern prose; one style alone \
with `/novels`, `/technical`, `/modern` |
| a path | `.txt`, `.jsonl`, `.json`, `.parquet`, `.jsonl.gz`, `.json.gz` (`text_key`, or `messages_key` with the chat \
template), a `save_to_disk` folder, `.safetensors` with `input_ids` |
| `wikitext2`, `ptb`, `c4` | built as the quantization papers build them; `path:` reads a local file of the same schema |
| `fineweb-edu`, `slimpajama`, `dclm` | web text, windows as of `c4` |
| `ultrachat`, `smoltalk` | chats, with the chat template |
| `hub:NAME` | any dataset of the Hugging Face hub |
| `generate:` | sampled from the model itself: no data at all |

A list of sources is a mixture, with a `weight` each. [Text](text.md) says which to take, and what is behind every name.
The parts of `builtin:` share no paragraph. The evaluation part shares no project with the others, and no novel;
`src/lbllm_cli/data/text/NOTICE.md` names sources and licences.
"""
_CHANGES = """
## What may change later

A finished stage is up to date only with the inputs that it was made from, and refuses others. These keys are no inputs, or only
through the text that they name. A section stands for all its keys.

| key | why |
|---|---|
"""
_NOTHING: Any = object()


def resolved(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """A schema, or the definition that it refers to."""
    name = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    return definitions[name] if name else schema


def section_of(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The section that is a key's value, if one is; of a list the section of its items."""
    for part in (schema, *schema.get("anyOf", ()), schema.get("items", {})):
        found = resolved(part, definitions)
        if "properties" in found:
            return found
    return None


def number(value: float) -> str:
    """4096 -> "4,096"; what is one below a power of two that nobody counts to, as that."""
    if value == int(value) and value > 1 << 30 and int(value) & int(value) + 1 == 0:
        return f"2^{int(value).bit_length()} - 1"
    return f"{int(value) if value == int(value) else value:,}"


def bounds(schema: dict[str, Any]) -> str:
    """The range of a number in words: "0 to 1", "above 0, at most 1"."""
    low, high = (number(schema[key]) if key in schema else "" for key in ("minimum", "maximum"))
    above, below = (number(schema[key]) if key in schema else "" for key in ("exclusiveMinimum", "exclusiveMaximum"))
    if low and high:
        return f", {low} to {high}"
    parts = [f"above {above}" if above else "", f"at least {low}" if low else "", f"below {below}" if below else ""]
    return "".join(f", {part}" for part in (*parts, f"at most {high}" if high else "") if part)


def kind(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in schema:
        return " or ".join(kind(part, definitions) for part in schema["anyOf"] if part.get("type") != "null")
    if "properties" in resolved(schema, definitions):
        return "section"
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        items = schema["items"]
        if resolved(items, definitions).get("title") == "Source":
            return "[source](#a-source), or a list of them"
        least, most = schema.get("minItems"), schema.get("maxItems")
        count = f"list of {least}" if least == most and least else f"list of {least} or more" if least else "list"
        return f"{count}: {kind(items, definitions)}"
    if schema["type"] == "object":
        return f"mapping of text to {kind(schema['additionalProperties'], definitions)}"
    names = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text"}
    pattern = f", `{schema['pattern']}`" if "pattern" in schema else ""
    length = f", at most {schema['maxLength']} characters" if "maxLength" in schema else ""
    return names[schema["type"]] + bounds(schema) + cell(pattern) + length


def cell(text: str) -> str:
    """A text in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def shown(value: Any) -> str:
    """A default as YAML has it, short enough for a table."""
    if value is _NOTHING:
        return "none: give one"
    if isinstance(value, list) and value and all(isinstance(item, dict) and "source" in item for item in value):
        names = [item["name"] if "name" in item else item["source"] for item in value]
        return ", ".join(f"`{name}`" for name in names)
    if value == {}:
        return "`{}`"
    return "" if isinstance(value, dict) else f"`{json.dumps(value)}`".replace('"', "")


def rows(section: dict[str, Any], values: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[str]:
    """A table of a section's keys. values: its defaults, where they are known from what it stands in."""
    yield "| key | value | default | |"
    yield "|---|---|---|---|"
    for key, schema in section["properties"].items():
        inner = section_of(schema, definitions)
        default = values.get(key, schema.get("default", _NOTHING))
        meaning = schema.get("description", "")
        if inner is not None and inner["title"] != "Source":
            meaning = f"{meaning or inner['description'].rstrip('.')}; see [below](#{anchor(prefix + key)})"
        yield f"| `{key}` | {kind(schema, definitions)} | {shown(default)} | {cell(meaning)} |"


def anchor(heading: str) -> str:
    """Of a heading that is a dotted key."""
    return heading.replace(".", "")


def sections(schema: dict[str, Any], values: Any, definitions: dict[str, Any], path: str) -> Iterator[str]:
    """Heading, text and table of a section, then those of the sections in it."""
    yield f"\n## {path}\n\n{' '.join(schema['description'].split())}\n"
    defaults = values if isinstance(values, dict) else {}
    yield from rows(schema, defaults, definitions, f"{path}.")
    for key, part in schema["properties"].items():
        inner = section_of(part, definitions)
        if inner is not None and inner["title"] != "Source":
            yield from sections(inner, defaults.get(key), definitions, f"{path}.{key}")


def page() -> str:
    """The whole page."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    example = Recipe.model_validate({"model": {"path": "?"}, "output": {"dir": "?"}}).model_dump(mode="json")
    for section, key in (("model", "path"), ("output", "dir")):
        del example[section][key]
    lines = [_INTRODUCTION]
    version = schema["properties"].pop("recipe_version")
    lines.append(f"`recipe_version`: {kind(version, definitions)}; {version['description']}.")
    lines.append(_INIT.rstrip())
    for key, part in schema["properties"].items():
        found = section_of(part, definitions)
        assert found is not None
        lines += sections(found, example[key], definitions, key)
        if key == "data":
            source = definitions["Source"]
            lines += [f"\n## A source\n\n{source['description']}", _SOURCES, *rows(source, {}, definitions, "")]
    changes = [f"| `{key}` | {why} |" for key, why in NOT_IN_FINGERPRINT.items()]
    return "\n".join([*lines, _CHANGES + "\n".join(changes)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = False
    for file, write in ((PAGE, page), (SCHEMA_FILE, schema_text)):
        if not check:
            file.write_text(write(), encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != write():
            print(f"{file.name} is not what the schema says; run: python scripts/recipe_reference.py", file=sys.stderr)
            stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
