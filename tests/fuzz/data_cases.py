"""Files of text, records, tokens and tasks that are wrong, odd, or none."""

import gzip
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from bases import LOCK, RECIPE, stage_writes
from model_cases import TEMPLATES
from mutate import LONE, ODD, dump_json, load_json, mutate_bytes, mutate_tree, nested, spoil_file
from promise import Case
from safetensors.torch import save_file

_WRITES = (*stage_writes("ptq"), "work/run/eval*")
Record = dict[str, Any]


def _case(kind: str, rng: random.Random, source: str, *overrides: str, outcome: Any = "any") -> Case:
    """A command that reads `source` as calibration or as evaluation text."""
    recipe = ["--recipe", RECIPE]
    if rng.random() < 0.6:
        words = [f"data.calibration.source={source}", *overrides]
        command = rng.choice([["validate", *recipe], ["ptq", *recipe], ["ptq", "--dry-run", *recipe]])
    else:
        words = [f"data.evaluation=[{{name: x, source: {source}, length: 16, segments: 2}}]", *overrides]
        command = rng.choice([["validate", *recipe], ["eval", *recipe]])
    return Case(f"{command[0]}: {kind}", [*command, "--", *words], _WRITES, outcome)


def _records(work: Path) -> list[Record]:
    text = (work / "chapter.txt").read_text(encoding="utf-8")
    return [{"text": text[i * 1000 : (i + 1) * 1000], "id": i} for i in range(12)]


def _text(work: Path, rng: random.Random) -> Case:
    good = (work / "chapter.txt").read_bytes()
    how, content = rng.choice(
        [
            ("Latin-1", b"\xe9" + good), ("UTF-16", good.decode().encode("utf-16")), ("empty", b""), ("blank", b" \n" * 5000),
            ("NUL", b"\0" * 5000 + good), ("long line", b"word " * 2_000_000), ("one word", b"x" * 3_000_000),
            ("binary", rng.randbytes(20_000)),
            ("BOM", b"\xef\xbb\xbf" + good), ("controls", bytes(range(32)) * 500 + good), ("surrogates", b"\xed\xa0\x80" + good),
            ("combining", "é\u0301\u0302".encode() * 9000), ("special tokens", b"<|endoftext|></s><s>" * 2000),
            ("short", b"A word."),
        ]
    )  # fmt: skip
    (work / "odd.txt").write_bytes(content)
    return _case(f"text {how}", rng, "odd.txt")


def _lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record).encode("utf-8", "surrogatepass") + b"\n" for record in records)


def _json_lines(work: Path, rng: random.Random) -> Case:
    records: list[Any] = list(_records(work))
    place, how = rng.randrange(len(records)), rng.randrange(7)
    suffix = rng.choice([".jsonl", ".jsonl", ".jsonl.gz"])
    if how == 0:
        records[place] = rng.choice(
            [*ODD, [records[place]], {"text": None}, {"text": 7}, {"text": ["x"]}, {"text": {"text": "x"}}, {"Text": "x"}]
        )
        content = _lines(records)
    elif how == 1:
        records[place]["text"] = rng.choice([LONE * 3, "x" + LONE, "\udfff\ud800", "", "\x00" * 2000, None])
        content = json.dumps(records[place]).encode() + b"\n" + _lines(records)
    elif how == 2:
        content = (
            _lines(records[:place])
            + nested(rng, *rng.choice([("[", "]"), ('{"text":', "}")])).encode()
            + b"\n"
            + _lines(records[place:])
        )
    elif how == 3:
        content = _lines(records) + rng.choice(
            [b'{"text": "x', b"x", b"\xff\n", b'{"text": NaN}\n', b"\xef\xbb\xbf{}\n", b"[]\n", b"null\n", b"{}\n"]
        )
    elif how == 4:
        content = rng.choice(
            [b"", b"\n\n", b"\xef\xbb\xbf" + _lines(records), _lines(records).replace(b"\n", b"\r"), _lines(records)[:-1]]
        )
    elif how == 5:
        content = json.dumps({"text": "word " * 2_000_000}).encode()
    else:
        content = mutate_bytes(_lines(records), rng)[0]
    packed = gzip.compress(content, 1) if suffix.endswith(".gz") else content
    (work / f"odd{suffix}").write_bytes(packed)
    return _case(f"{suffix} {how}: {content[:40]!r}", rng, f"odd{suffix}")


def _json(work: Path, rng: random.Random) -> Case:
    records: Any = list(_records(work))
    how = rng.randrange(5)
    if how == 0:
        mutate_tree(records, rng)
        content = json.dumps(records).encode()
    elif how == 1:
        content = json.dumps(rng.choice([*ODD, {"data": records}, records[0]])).encode()
    elif how == 2:
        content = nested(rng, *rng.choice([("[", "]"), ('[{"text":', "}]")])).encode()
    elif how == 3:
        content = b" " * rng.choice([10, 300]) + json.dumps(records).encode()
    else:
        content = mutate_bytes(json.dumps(records).encode(), rng)[0]
    (work / "odd.json").write_bytes(content)
    return _case(f"json {how}: {content[:40]!r}", rng, "odd.json")


def _compressed(work: Path, rng: random.Random) -> Case:
    packed = gzip.compress(_lines(_records(work)))
    changed, what = rng.choice(
        [
            mutate_bytes(packed, rng),
            (packed + packed, "twice"),
            (packed + b"x", "padded"),
            (b"", "empty"),
            (_lines(_records(work)), "not compressed"),
        ]
    )
    if rng.random() < 0.15:
        changed, what = gzip.compress(b" " * 300_000_000, 1), "unfolds to 300 MB of blanks"
    (work / "odd.jsonl.gz").write_bytes(changed)
    return _case(f"gzip {what}", rng, "odd.jsonl.gz")


def _parquet(work: Path, rng: random.Random) -> Case:
    import pyarrow
    import pyarrow.parquet as parquet

    records = _records(work)
    columns: list[dict[str, Any]] = [
        {"text": [record["text"] for record in records]}, {"text": [1, 2, 3]}, {"text": [None] * 5}, {"text": [["x"]] * 9},
        {"other": ["x"]}, {},
        {"text": [b"\xff\xfe"] * 3}, {"text": []}, {"text": ["x", None, "y"]}, {"text": [{"text": "x"}] * 3}, {"": ["x"]},
    ]  # fmt: skip
    choice = columns[0] if rng.random() < 0.5 else rng.choice(columns)
    handle = io.BytesIO()
    parquet.write_table(pyarrow.table(choice), handle)
    content, what = handle.getvalue(), f"columns {list(choice)}"
    if choice is columns[0]:
        end = len(content)
        content, what = mutate_bytes(content, rng, *rng.choice([(0, end), (end - 600, end), (end - 8, end)]))
    (work / "odd.parquet").write_bytes(content)
    return _case(f"parquet {what}", rng, "odd.parquet")


def _folder(work: Path, rng: random.Random) -> Case:
    """A folder that save_to_disk wrote, one of its files changed."""
    import datasets

    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(_records(work))
    (whole if rng.random() < 0.5 else datasets.DatasetDict({"train": whole, "test": whole})).save_to_disk(str(work / "saved"))
    file = rng.choice(sorted(path for path in (work / "saved").rglob("*") if path.is_file()))
    how = rng.randrange(4)
    if how == 0 and file.suffix == ".json":
        values = load_json(file)
        what = mutate_tree(values, rng)
        dump_json(values, file)
    elif how == 1:
        what = spoil_file(file, rng)
    elif how == 2 and file.suffix == ".json":
        what = "something else"
        dump_json(rng.choice(ODD), file)
    else:
        content, what = mutate_bytes(file.read_bytes(), rng)
        file.write_bytes(content)
    return _case(f"save_to_disk, {file.name}: {what}", rng, "saved")


def _tokens(work: Path, rng: random.Random) -> Case:
    shapes = rng.choice([(400,), (20, 32), (0,), (0, 32), (), (2, 3, 200), (20, 3), (1, 0)])
    dtype = rng.choice([torch.int64, torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool, torch.int16])
    ids = torch.randint(0, 100, shapes).to(dtype)
    if ids.numel() and dtype == torch.int64 and rng.random() < 0.6:
        ids.view(-1)[0] = rng.choice([-1, 1024, 2**62, -(2**62), 1023])
    name = rng.choice(["input_ids", "input_ids", "input_ids", "ids", ""])
    save_file({name: ids}, work / "odd.safetensors")
    what = f"tokens {name} {shapes} {dtype}"
    if rng.random() < 0.4:
        from weight_files import spoil_data, spoil_header

        what = rng.choice([spoil_header, spoil_data])(work / "odd.safetensors", rng)
    return _case(what, rng, "odd.safetensors")


def _chat(work: Path, rng: random.Random) -> Case:
    """Messages that a template cannot render, and templates that cannot render messages."""
    good = [{"role": "user", "content": "What is a comet?"}, {"role": "assistant", "content": "A ball of ice. " * 20}]
    template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    records: list[Any] = [{"messages": good} for _ in range(20)]
    what = "messages as they should be"
    if rng.random() < 0.45:
        template = what = rng.choice(TEMPLATES)
    else:
        odd: list[Any] = [
            None, [], "text", "", 7, {}, [None], ["x"], [[]], [{}], [{"role": "user"}], [{"content": "x"}],
            [{"role": None, "content": None}],
            [{"role": 7, "content": 7}], [{"role": "x", "content": ["x"]}],
            [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            [{"role": "user", "content": LONE}], {"role": "user", "content": "x"}, [{"role": "user", "content": {"a": 1}}],
            [[good]], True,
        ]  # fmt: skip
        value = rng.choice(odd)
        for index in rng.choice([[0], [len(records) - 1], range(len(records))]):
            records[index] = {"messages": value}
        what = f"messages {str(value)[:50]!r}"
        if rng.random() < 0.4:
            mutate_tree(records, rng)
        if rng.random() < 0.3:
            template = "{{ messages[0]['content'] + messages[1]['content'].strip() }}"
    (work / "chat.jsonl").write_bytes(_lines(records))
    file = work / "model" / "tokenizer_config.json"
    dump_json({**load_json(file), "chat_template": template}, file)
    return _case(f"chat: {what[:60]!r}", rng, "{source: chat.jsonl, messages_key: messages}")


def _spoiled(work: Path, rng: random.Random) -> Case:
    suffix = rng.choice([".txt", ".jsonl", ".json", ".parquet", ".safetensors", ".jsonl.gz"])
    file = work / f"odd{suffix}"
    file.write_bytes(_lines(_records(work)) if "json" in suffix else (work / "chapter.txt").read_bytes())
    return _case(f"spoiled {spoil_file(file, rng)}", rng, file.name)


def _keys(work: Path, rng: random.Random) -> Case:
    """Keys of a source that do not fit it."""
    (work / "a.jsonl").write_bytes(_lines(_records(work)))
    key = rng.choice(["text_key", "messages_key", "split", "config", "path", "temperature", "weight"])
    value = rng.choice(
        ['""', "x", "id", "text", '"\\0"', '"\\uD800"', "a.jsonl", "nothing", "pipe", "1.5", "model", "~nosuchuser"]
    )
    source = rng.choice(["a.jsonl", "chapter.txt", "wikitext2", "c4", "redpajama", "builtin:calibration", "generate:", "ptb"])
    os.mkfifo(work / "pipe")
    return _case(f"{source} with {key}={value}", rng, f"{{source: {json.dumps(source)}, {key}: {value}}}")


def _task(work: Path, rng: random.Random) -> Case:
    """YAML of an lm-eval task."""
    (work / "questions.jsonl").write_bytes(_lines([{"q": f"Is {i} even?", "a": i % 2} for i in range(4)]))
    values: Record = {
        "task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "a", "doc_to_choice": ["yes", "no"],
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    how = rng.randrange(4)
    what = "a name that is a path"
    if how == 0:
        values["task"] = rng.choice(
            ["../../x", "/absent/x", "..", "", "a/b", "x" * 300, "\x00", None, 7, [], "a\nb", LONE, ".", "~"]
        )
        what = f"name {str(values['task'])[:20]!r}"
    elif how == 1:
        what = mutate_tree(values, rng)
    text = json.dumps(values)
    if how == 2:
        what, text = (
            "text",
            rng.choice(
                [
                    nested(rng),
                    "",
                    "7",
                    "a: *x",
                    "!!bool 7",
                    "!function x.y",
                    "!function os.system",
                    "include: pipe",
                    "include: t.yaml",
                    "&a [*a]",
                ]
            ),
        )
    (work / "t.yaml").write_text(text)
    if how == 3:
        what = spoil_file(work / rng.choice(["t.yaml", "questions.jsonl"]), rng)
    command = rng.choice([["validate"], ["eval", "--dry-run"], ["eval"]])
    words = ["eval.tasks=[t.yaml]", "eval.checkpoints=[base]", "eval.limit=2"]
    return Case(f"task {what}", [*command, "--recipe", RECIPE, "--", *words], (*LOCK, "work/run/eval", "work/run/eval/*"))


KINDS = (
    _json_lines, _chat, _text, _json, _tokens, _parquet, _folder, _compressed, _spoiled, _task, _keys, _chat, _json_lines,
    _parquet, _tokens,
)  # fmt: skip
