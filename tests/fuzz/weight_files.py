"""safetensors files that are damaged in their parts: header, offsets, dtypes, data."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mutate import ODD, dump_json, load_json, mutate_bytes, mutate_tree, nested
from safetensors.torch import load_file, save_file

Header = dict[str, Any]


def split(path: Path) -> tuple[Header, bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: Path, header: Header | bytes, data: bytes, length: int | None = None) -> None:
    """Writes a file with this header, `length` as its declared length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Loads, changes and saves the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def spoil_header(path: Path, rng: random.Random) -> str:
    """The header of a file says something else; says what. Whether that matters is open."""
    header, data = split(path)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry, how = header[name], rng.randrange(13)
    start, end = entry["data_offsets"]
    if how == 0:
        entry["dtype"] = rng.choice(
            [None, 7, [], {}, "", "F33", "f32", "BF16", "I64", "F64", "U8", "BOOL", ["F32"], "F8_E4M3", "x" * 10**5]
        )
    elif how == 1:
        shapes: list[Any] = [
            None,
            7,
            "x",
            [],
            [0],
            [-1],
            [1.5],
            ["x"],
            [2**63],
            [2**40, 2**40],
            [True],
            [[1]],
            [1] * 500,
            {},
            [10**30, 0],
        ]
        entry["shape"] = rng.choice(shapes)
    elif how == 2:
        pairs: list[Any] = [
            None, [], [0], [start], [end, start], [start, end + 4], [start - 4, end], [-8, -4], [0, 0], ["0", "4"], [0.0, 4.0],
            [2**63, 2**63 + 4], [10**30, 10**30 + 4], [start, end, end], {}, [True, 5], [None, None], [start + 1, end + 1],
        ]  # fmt: skip
        entry["data_offsets"] = rng.choice(pairs)
    elif how == 3:
        header[name] = rng.choice([None, 7, "x", [], {}, [entry]])
    elif how == 4:
        entry.pop(rng.choice(list(entry)))
    elif how == 5:
        odd: list[Any] = [
            None,
            7,
            [],
            {"format": 7},
            {"format": None},
            {"format": "tf"},
            {"a": {"b": 1}},
            {"x" * 10**5: "x"},
            "x",
        ]
        header["__metadata__"] = rng.choice(odd)
    elif how == 6:
        other = header[rng.choice(names)]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif how == 7:
        header[rng.choice(["", "x", "model.layers.7.x", "\ud800", "lm_head.weight", "../x", "model"])] = dict(entry)
    elif how == 8:
        return f"header: {mutate_tree(header, rng, odd=ODD)}{join(path, header, data) or ''}"
    elif how == 9:
        deep = rng.choice([nested(rng), nested(rng, '{"a":', "}"), f'{{"x": {nested(rng)}}}'])
        join(path, deep.encode(), data)
        return "header is nested"
    elif how == 10:
        length = rng.choice([0, 1, 2**63, 2**64 - 1, len(data), 2**40, 10**8, 7, 99_999_999])
        join(path, header, data, length)
        return f"length of the header: {length}"
    elif how == 11:
        join(
            path,
            rng.choice([b"", b"{}", b"[]", b"null", b"{", b'{"a": 1}', b" " * 64, b'{"__metadata__": {}}', b"\xff" * 16]),
            data,
        )
        return "another header"
    else:
        text = json.dumps(header)
        join(path, (text[:-1] + f', "{name}": {json.dumps(entry)}}}').encode(), data)
        return f"{name} twice"
    join(path, header, data)
    return f"header, {name}: {json.dumps(header.get(name))[:90]}, kind {how}"


def spoil_data(path: Path, rng: random.Random) -> str:
    """Bytes of a file are other ones; says which."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    changed, what = mutate_bytes(content, rng, *rng.choice([(0, 8), (8, end), (end, len(content)), (0, len(content))]))
    path.write_bytes(changed)
    return f"{path.name}: {what}"


def harm_tensor(path: Path, rng: random.Random, name: str | None = None) -> str:
    """Something that must be refused: a tensor removed, of another shape, or no longer finite; says what."""
    said = ""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal said
        chosen = name or rng.choice(sorted(tensors))
        tensor, how = tensors[chosen], rng.randrange(6)
        if how <= 1 or not tensor.is_floating_point():
            tensors.pop(chosen)
            said = f"{chosen} removed"
        elif how <= 3:
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), float("-inf")])
            said = f"{chosen} not finite"
        elif how == 4:
            tensors[chosen] = torch.cat([tensor, tensor])
            said = f"{chosen} twice as long"
        else:
            tensors[chosen + rng.choice(["x", ".weight", " "])] = tensors.pop(chosen)
            said = f"{chosen} renamed"

    edit_tensors(path, change)
    return said


def scale_values(path: Path, rng: random.Random) -> str:
    """All values are other ones, the header as it was; says so."""
    header, tensors = split(path)[0], load_file(path)
    scaled = {name: (tensor * 1.01).to(tensor.dtype) for name, tensor in tensors.items()}
    save_file(scaled, path, metadata=header.get("__metadata__"))
    return "values scaled"


def spoil_index(folder: Path, rng: random.Random) -> str:
    """The index of a sharded folder says something else; says what."""
    index = folder / "model.safetensors.index.json"
    values = load_json(index)
    names = sorted(values["weight_map"])
    name, how = rng.choice(names), rng.randrange(5)
    if how == 0:
        odd = [
            None,
            7,
            [],
            {},
            "",
            "../x",
            "../outside.safetensors",
            "/etc/passwd",
            "config.json",
            ".",
            "..",
            "model/../x",
            "nothing",
        ]
        odd += ["\x00", "\ud800", "x" * 300, "/dev/zero", "tokenizer.json", True]  # type: ignore[list-item]
        values["weight_map"][name] = rng.choice(odd)
    elif how == 1:
        values["weight_map"] = rng.choice([None, 7, [], {}, "x", [name], {"": ""}, {name: None}])
    elif how == 2:
        del values["weight_map"][name]
    elif how == 3:
        values = rng.choice(
            [None, 7, [], {}, "x", {"weight_map": values["weight_map"]}, {"metadata": {}}, {**values, "metadata": 7}]
        )
    else:
        return f"index: {mutate_tree(values, rng)}{dump_json(values, index) or ''}"
    dump_json(values, index)
    return f"index, {how}: {str(values)[:60]}"
