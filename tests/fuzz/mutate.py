"""Mutations that know only about values, bytes and files: what the classes of cases are made of."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A text that JSON can hold and UTF-8 cannot.
LONE = "\ud800"
# In place of any value. Names are relative: what a command makes of them stays in the folder of the case.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.0, -0.5, 1e-320, 5e-324, 1e29, 1e308, float("inf"),
    float("-inf"), float("nan"), "", " ", "x", "0", "-1", "nan", "null", "\x00", "\n", "é☃", "x" * 300, "x" * 20_000,
    "~nosuchuser/x",
    "../x", "%s%n", "{{ x }}", "<script>", LONE, [], [[]], {}, [None], [0], [-1], ["x"], {"x": 1}, {"": None}, [[[[[1]]]]],
    {"a": {"b": {"c": []}}}, [1, "x", None, {}],
)  # fmt: skip

Path_ = tuple[Any, ...]


def leaves(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Paths of every node below the top, inner ones too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield (*path, key)
        yield from leaves(below, (*path, key))


def at(value: Any, path: Path_) -> Any:
    """The node at a path."""
    for key in path:
        value = value[key]
    return value


def mutate_tree(value: Any, rng: random.Random, paths: list[Path_] | None = None, odd: tuple[Any, ...] = ODD) -> str:
    """One change in place somewhere in nested dicts and lists; says which. paths: where it may be, default anywhere."""
    path = rng.choice(paths or list(leaves(value)) or [()])
    if not path:
        return "nothing"
    owner, key = at(value, path[:-1]), path[-1]
    where, how = ".".join(map(str, path)), rng.randrange(8)
    if how == 0:
        del owner[key]
        return f"{where} deleted"
    if how == 1 and isinstance(owner, dict):
        owner[str(key) + rng.choice(["x", " ", "", "\n", "2"])] = owner.pop(key)
        return f"{where} renamed"
    if how == 2:
        other = at(value, rng.choice(list(leaves(value))))
        owner[key] = json.loads(json.dumps(other))
        return f"{where} takes another's value"
    if how == 3 and isinstance(owner[key], list | str):
        owner[key] = owner[key] * rng.choice([0, 2, 3])
        return f"{where} repeated"
    if how == 4 and isinstance(owner[key], int | float):
        owner[key] = owner[key] * rng.choice([-1, 0, 2, 1000, 0.5, 1e10]) + rng.choice([0, 1, -1])
        return f"{where} = {owner[key]}"
    if how == 5:
        owner[key] = rng.choice([[owner[key]], {"x": owner[key]}, str(owner[key])])
        return f"{where} wrapped"
    owner[key] = rng.choice(odd)
    return f"{where} = {str(owner[key])[:40]!r}"


def nested(rng: random.Random, opening: str = "[", closing: str = "]", inner: str = "0") -> str:
    """JSON that is nested a few hundred to a hundred thousand times."""
    depth = rng.choice([500, 1_000, 5_000, 100_000])
    return opening * depth + inner + closing * depth


def mutate_bytes(data: bytes, rng: random.Random, start: int = 0, end: int | None = None) -> tuple[bytes, str]:
    """One change of some bytes, between start and end; says which."""
    content, end = bytearray(data), len(data) if end is None else min(end, len(data))
    place = rng.randrange(start, max(end, start + 1))
    how = rng.randrange(6)
    if how == 0 and place < len(content):
        content[place] ^= 1 << rng.randrange(8)
        return bytes(content), f"bit of byte {place} flipped"
    if how == 1:
        return bytes(content[:place]), f"cut after {place} bytes"
    if how == 2:
        content[place:place] = rng.randbytes(rng.choice([1, 8, 100]))
        return bytes(content), f"bytes put in at {place}"
    if how == 3:
        del content[place : place + rng.choice([1, 8, 100])]
        return bytes(content), f"bytes taken out at {place}"
    if how == 4:
        piece = content[place : place + rng.choice([1, 8, 100])]
        content[place:place] = piece
        return bytes(content), f"bytes doubled at {place}"
    content[place : place + 8] = rng.choice([b"\0" * 8, b"\xff" * 8, b"\xf0\x9f", b"[" * 8, b'"' * 8])
    return bytes(content), f"bytes replaced at {place}"


def spoil_file(path: Path, rng: random.Random) -> str:
    """Something else in the place of a file; says what."""
    how = rng.choice(["gone", "empty", "folder", "pipe", "binary", "cut", "link to nothing", "loop", "nested", "device", "bytes"])
    data = path.read_bytes()
    path.unlink()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "binary":
        path.write_bytes(rng.randbytes(rng.choice([1, 7, 8, 9, 1000])))
    elif how == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "link to nothing":
        path.symlink_to("nothing")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "nested":
        path.write_text(nested(rng, *rng.choice([("[", "]"), ('{"a":', "}")])))
    elif how == "device":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/full"]))
    elif how == "bytes":
        path.write_bytes(mutate_bytes(data, rng)[0])
    return f"{path.name}: {how}"


def copy_into(base: Path, target: Path) -> None:
    """Copies the contents of a folder, times too, into one that may be there."""
    shutil.copytree(base, target, symlinks=True, dirs_exist_ok=True)


def dump_json(value: Any, path: Path) -> None:
    """JSON as it is, infinities and lone surrogates too."""
    path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))


def load_json(path: Path) -> Any:
    """JSON of a file."""
    return json.loads(path.read_text(encoding="utf-8"))
