"""Recipes and overrides that are wrong or odd as texts: YAML, encodings, files."""

import json
import random
from pathlib import Path
from typing import Any

import yaml
from bases import LOCK, RECIPE
from mutate import load_json, mutate_bytes, nested, spoil_file
from promise import Case

# Commands that write nothing, whatever output.dir is, oftener than those that do.
_READING = (["config"], ["validate"], ["validate"], ["ptq", "--dry-run"], ["eval", "--dry-run"], ["distill", "--dry-run"])


def whole_tree(work: Path) -> dict[str, Any]:
    """The recipe of a case as values, with more of its keys."""
    values: dict[str, Any] = load_json(work / RECIPE)
    # Sections that have no key in the small recipe, so that a mutation finds every kind of value.
    values["eval"] = {"checkpoints": ["base"], "tasks": [], "num_fewshot": 0, "limit": 2}
    values["export"] = {"checkpoint": "latest", "format": "packed", "shard_gb": 0.1}
    values["runtime"] |= {"seed": 0, "streams": "auto", "save_minutes": 1.0}
    values["ptq"] |= {"levels": "em", "damping": 0.01, "asymmetric": "auto", "held_out": 0.25, "sequential": True}
    values["distill"] |= {"train": ["weights", "levels"], "polarise_beta": [2.0, 2.0], "loss": "robust", "batch_size": 2}
    text = values["data"]["calibration"]["source"]
    values["data"]["training"]["source"] = [
        {"source": text, "weight": 2.0},
        {"source": "builtin:calibration/novels", "weight": 1e-2},
    ]
    values["model"] |= {"dtype": "source", "revision": None}
    return values


def write_tree(work: Path, values: Any) -> None:
    """Puts values in the place of the recipe."""
    # ASCII: what cannot be encoded is escaped, and YAML reads it back.
    (work / RECIPE).write_text(yaml.safe_dump(values, sort_keys=False), encoding="ascii")


def read_by(kind: str, rng: random.Random, *overrides: str, outcome: Any = "any", **others: Any) -> Case:
    """A command that reads the recipe, with overrides."""
    command = rng.choice(_READING)
    return Case(kind, [*command, "--recipe", RECIPE, "--", *overrides], LOCK, outcome, **others)


def deep(work: Path, rng: random.Random) -> Case:
    """Nested a few hundred times and more."""
    flow = rng.choice([("[", "]"), ("{a: ", "}"), ("[{a: ", "}]"), ("!!seq [", "]"), ("- ", "")])
    text = nested(rng, *flow)
    if rng.random() < 0.3:
        return read_by("nested override", rng, f"ptq={text[:60_000]}", outcome="refused")
    (work / RECIPE).write_text(rng.choice(["", "model: ", "model: {path: model}\noutput: {dir: run}\nptq: "]) + text)
    return read_by("nested", rng, outcome="refused")


def tag(work: Path, rng: random.Random) -> Case:
    """Values that a tag, or their look, makes something that they are not."""
    value = rng.choice(
        [
            "!!bool 7", "!!bool []", "!!timestamp ''", "!!timestamp x", "!!int x", "!!int ''", "!!int 0x", "!!float x",
            "!!float ''",
            "!!float .", "!!binary 'ü'", "!!binary '?'", "!!binary x", "!!null x", "!!set {a, b}", "!!omap [a]", "!!pairs {a: 1}",
            "!!omap {a: 1}", "!!str [a]", "!!seq {}", "!!map []", "!!map x", "!unknown x",
            "!!python/object/apply:os.system [touch x]",
            "!!python/name:os.system", "!!merge x", "=", "<<", "!!value x", "2020-13-45", "1:99:99", "!!int 1:x", "0o9", "1__0",
            "0b",
            "!!float 1:x", "!<tag:yaml.org,2002:int> x", "!!int " + "9" * 5000, "9" * 5000, "1e99999", "!!float " + "9" * 5000,
            "0x" + "f" * 9000, "2001-01-01", "2001-01-01 25:00:00", "!!timestamp 2001-99-01", "*x", "&x", "&x *x", "@x", "`x",
            "%x", "? x",
        ]
    )  # fmt: skip
    if rng.random() < 0.4:
        key = rng.choice(["ptq.group_size", "ptq", "runtime.seed", "data.evaluation", "model.path", "output.dir", "eval.limit"])
        return read_by(f"override {key}={value[:40]}", rng, f"{key}={value}")
    head = rng.choice(["", "ptq: ", "ptq: {group_size: ", "model: {path: model}\noutput: {dir: run}\nruntime: {seed: "])
    (work / RECIPE).write_text(f"{head}{value}{'}' * head.count('{') if '}' not in head else '}'}", encoding="utf-8")
    return read_by(f"tag {value[:40]}", rng)


def alias(work: Path, rng: random.Random) -> Case:
    """Aliases: of nothing, of themselves, and such as unfold exponentially."""
    count = rng.choice([8, 30, 60])
    unfolding = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, count))
    laughing = ", ".join(f"&l{i} [" + ", ".join([f"*l{i - 1}" if i else "x"] * 9) + "]" for i in range(rng.choice([4, 9])))
    merging = "b0: &b0 {x: 1}\n" + "".join(
        f"b{i}: &b{i} {{<<: [*b{i - 1}, *b{i - 1}], y{i}: *b{i - 1}}}\n" for i in range(1, count)
    )
    text = rng.choice(
        [
            unfolding, f"ptq: {{group_size: [{laughing}]}}", merging, "a: &a [*a]", "&a {model: *a}", "&a a: *a",
            "ptq: &a {x: *a}",
            f"{unfolding}model: {{path: *a{count - 1}}}", "a: *nothing", "&a a: &a b", "<<: *x", "x: &x {y: 1}\n<<: *x", "<<: 3",
            "<<: [{model: {path: model}}, {output: {dir: run}}]", f"model: {{path: &x model}}\noutput: {{dir: *x}}\n{unfolding}",
            "&a [*a, *a]", "? &a [*a]\n: x", "? [a]\n: x", "? {a: b}\n: x", "&m {model: {path: model}, output: {dir: run}}",
        ]
    )  # fmt: skip
    if rng.random() < 0.35:
        value = rng.choice(["&a {x: *a}", "&a [*a]", "*x", "[&a [x, x], *a, *a]", f"[{laughing}]", "&a [&b [*a], *b]"])
        key = rng.choice(["ptq", "ptq.group_size", "data.evaluation", "eval.tasks", "model", "data.calibration.source"])
        return read_by(f"alias in an override {key}", rng, f"{key}={value}")
    (work / RECIPE).write_text(text)
    return read_by(f"alias: {text[:40]!r}", rng)


def encoding(work: Path, rng: random.Random) -> Case:
    """Bytes that are no text, and texts that are no recipe."""
    good = (work / RECIPE).read_bytes()
    how, content = rng.choice(
        [
            ("UTF-16", good.decode().encode("utf-16")), ("BOM", b"\xef\xbb\xbf" + good), ("Latin-1", b"# \xe9\n" + good),
            ("NUL", good + b"\0"),
            ("empty", b""), ("comment", b"# nothing\n"), ("two documents", good + b"\n---\n" + good),
            ("tabs", good.replace(b" ", b"\t")),
            ("CRLF", good.replace(b"\n", b"\r\n")), ("control", good.replace(b"model", b"mo\x07del")),
            ("binary", rng.randbytes(500)),
            ("scalar", b"3"), ("list", b"[1, 2]"), ("null", b"null"), ("directive", b"%YAML 9.9\n---\n" + good),
            ("bad directive", b"%YAML x\n---\n"),
            ("long line", b"model: {path: " + b"x" * 2_000_000 + b"}"),
            ("many keys", b"".join(b"k%d: 1\n" % i for i in range(20_000))),
            ("NEL", good + "\n\u0085x: 1\u2028y: 2".encode()), ("long key", b"? " + b"k" * 5000 + b"\n: 1"),
            ("surrogate", b"\xed\xa0\x80: 1"),
        ]
    )  # fmt: skip
    (work / RECIPE).write_bytes(content)
    return read_by(f"encoding: {how}", rng)


def other_bytes(work: Path, rng: random.Random) -> Case:
    """Some bytes are other ones."""
    if rng.random() < 0.5:
        write_tree(work, whole_tree(work))
    content, what = mutate_bytes((work / RECIPE).read_bytes(), rng)
    (work / RECIPE).write_bytes(content)
    return read_by(what, rng)


def spoiled(work: Path, rng: random.Random) -> Case:
    """Something else in the place of the file."""
    what = spoil_file(work / RECIPE, rng)
    return read_by(what, rng)


def keys(work: Path, rng: random.Random) -> Case:
    """Keys that are none, or come twice."""
    text = json.dumps(whole_tree(work))
    key = rng.choice(
        ["1", "null", "[a]", "{a: b}", "true", "1.5", "2001-01-01", "''", "~", "!!binary eA==", '"\\uD800"', '"\\0"', "? "]
    )
    place = rng.choice(["top", "ptq", "twice"])
    if place == "twice":
        text = text[:-1] + ', "ptq": {}}'
    else:
        head = '"ptq": {' if place == "ptq" else "{"
        text = text.replace(head, f"{head}{key}: 1, ", 1)
    (work / RECIPE).write_text(text, encoding="utf-8")
    return read_by(f"key {key} in {place}", rng, outcome="refused")
