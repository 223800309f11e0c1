"""From named text to tokens: every kind of source, windows, mixtures, evaluation segments, refusals."""

import dataclasses
import gzip
import hashlib
import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lbllm_cli.core.errors import UsageError
from lbllm_cli.data import encode, records
from lbllm_cli.data import sources as text_sources
from lbllm_cli.data import tokens as data
from lbllm_cli.data.sources import PRESETS, STYLES, builtin_records
from lbllm_cli.recipe.base import Source
from lbllm_cli.recipe.schema import EvaluationSet, TokenSet

SENTENCE = "the river bank note seven under table glass moves slowly between old stones and we measured its height again"
VOCAB = 100_000


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE, as text."""
    tokenizer = ByteLevelBPETokenizer()
    texts = [record["text"] for record in islice(builtin_records("evaluation", "novels"), 2)]
    tokenizer.train_from_iterator(texts, vocab_size=400, special_tokens=["<s>"], show_progress=False)
    return tokenizer.to_str()


@pytest.fixture
def tokenizer(trained):
    """The tokenizer, with a BOS token and without a chat template."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained), bos_token="<s>")


def _text(seed: int, words: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    known = SENTENCE.split()
    return " ".join(known[i] for i in torch.randint(0, len(known), (words,), generator=generator).tolist())


@pytest.fixture
def texts():
    """Documents of different lengths, one of them empty."""
    return [_text(seed, 5 + 17 * seed) for seed in range(12)] + ["", "Füße, naïve — 模型"]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _calibrate(sources: list[Source], tokenizer: Any, sequences: int, length: int, seed: int = 0, **more: Any) -> Tensor:
    spec = TokenSet(source=sources, sequences=sequences, length=length, bos=more.pop("bos", False))
    sampler = more.pop("sampler", lambda *_: pytest.fail("nothing is to be sampled"))
    return data.training_tokens(spec, tokenizer, more.pop("vocab", VOCAB), data.Draw(seed, sampler, "data.calibration", **more))


def _evaluate(sources: list[Source], tokenizer: Any, length: int = 8, segments: int | None = None, **more: Any) -> Tensor:
    spec = EvaluationSet(name="text", source=sources, length=length, segments=segments, bos=more.pop("bos", False))
    return data.evaluation_tokens(spec, tokenizer, more.pop("vocab", VOCAB))


def _cut(ids: list[int], length: int) -> list[list[int]]:
    """Every whole window of `length` ids, from the start."""
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def _counting(tmp_path: Path, name: str, start: int, count: int) -> Source:
    """A pre-tokenized source whose ids tell their own place."""
    file = tmp_path / f"{name}.safetensors"
    save_file({"input_ids": torch.arange(start, start + count)}, file)
    return Source(source=str(file))


def _write(tmp_path: Path, kind: str, records: list[dict[str, Any]]) -> Source:
    """Records in a file or folder of some kind."""
    import datasets

    path = tmp_path / f"records.{kind}"
    lines = "\n".join(json.dumps(record) for record in records)
    if kind == "jsonl":
        path.write_text(lines + "\n\n", encoding="utf-8")
    elif kind == "lines.json":
        path.write_text(lines, encoding="utf-8")
    elif kind == "list.json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif kind == "indented.json":
        path.write_text("\n " + json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=5)
    elif kind == "folder":
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    else:
        other = datasets.Dataset.from_list([{"text": "of another split"}])
        datasets.DatasetDict({"other": other, "dev": datasets.Dataset.from_list(records)}).save_to_disk(str(path))
        return Source(source=str(path), split="dev")
    return Source(source=str(path))


@pytest.fixture(autouse=True)
def _quiet():
    import datasets

    datasets.disable_progress_bars()


KINDS = ["jsonl", "lines.json", "list.json", "indented.json", "parquet", "folder", "splits"]


@pytest.mark.parametrize("kind", KINDS)
def test_records_of_every_kind_give_the_same_text(tmp_path, tokenizer, texts, kind):
    item = _write(tmp_path, kind, [{"id": i, "text": text} for i, text in enumerate(texts)])
    text_sources.check(item, evaluating=False)
    assert list(text_sources.documents(item, False, tokenizer)) == texts
    expected = _cut([token for text in texts for token in _ids(tokenizer, text + "\n\n")], 8)
    assert _evaluate([item], tokenizer).tolist() == expected
    assert sorted(_calibrate([item], tokenizer, len(expected), 8).tolist()) == sorted(expected)


def test_a_text_file_is_one_document(tmp_path, tokenizer, texts):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(texts), encoding="utf-8")
    assert _evaluate([Source(source=str(file))], tokenizer).tolist() == _cut(_ids(tokenizer, "\n".join(texts) + "\n\n"), 8)
    file.write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(UsageError, match=r"a\.txt is not UTF-8 text: byte 3 cannot be decoded"):
        _evaluate([Source(source=str(file))], tokenizer)


def test_splits_of_a_folder(tmp_path, tokenizer):
    import datasets

    path = tmp_path / "splits"
    parts = {name: datasets.Dataset.from_list([{"text": f"{name} " * 50}]) for name in ("dev", "train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(path))
    for split, evaluating, expected in ((None, False, "train"), (None, True, "test"), ("dev", True, "dev")):
        (text,) = text_sources.documents(Source(source=str(path), split=split), evaluating, tokenizer)
        assert text.startswith(expected)
    with pytest.raises(UsageError, match="has no split validation; it has dev, train, test; set split"):
        list(text_sources.documents(Source(source=str(path), split="validation"), True, tokenizer))


def test_another_text_field(tmp_path, tokenizer):
    item = _write(tmp_path, "jsonl", [{"body": "first"}, {"body": "second"}])
    assert list(text_sources.documents(item.model_copy(update={"text_key": "body"}), False, tokenizer)) == ["first", "second"]


def test_a_missing_field_is_named_with_those_there_are(tmp_path, tokenizer):
    item = _write(tmp_path, "jsonl", [{"text": "a", "title": "b"}, {"title": "c", "body": "d"}])
    with pytest.raises(UsageError, match=r"records\.jsonl: record 1 has no field `text`, it has: title, body; set text_key or"):
        _evaluate([item], tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text"\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 50_000, r"a\.jsonl:2 is JSON that is nested too deeply"),
        ("a.jsonl", b'{"text": "\xe9"}\n', r"a\.jsonl cannot be read: 'utf-8' codec can't decode"),
        ("a.jsonl", "\0\0\0\0", r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", '{"text": "' + "9" * 20 + '", "n": ' + "9" * 5000 + "}", r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", '"text"\n', "record 0 has no field `text`, it has: str"),
        ("a.jsonl", "7\n", "record 0 has no field `text`, it has: int"),
        ("a.jsonl", "{}\n", "record 0 has no field `text`, it has: ; set"),
        ("a.jsonl", '{"text": ["a"]}\n', "field `text` of record 0 is list, expected text"),
        ("a.jsonl", '{"text": null}\n', "field `text` of record 0 is NoneType, expected text"),
        ("a.jsonl", '{"text": "a"}\n{"text": "a \\ud83d b"}\n', r"record 1, field `text` is no Unicode text: character 2"),
        ("a.jsonl", "", "holds 0 tokens, 8 are needed"),
        ("a.txt", "", "holds . tokens, 8 are needed"),
        ("a.json", '[{"text": "a"},', r"a\.json cannot be read: record 1 is not JSON"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', r"a\.json cannot be read: after record 0 the list does not"),
        ("a.json", '[{"text": "a"}] more', r"a\.json cannot be read: after record 0"),
        ("a.json", '[{"text": "a"}', r"a\.json cannot be read: record 0 is not JSON"),
        ("a.json", '[{"text": "a"}, ' + "[" * 50_000, r"a\.json cannot be read: record 1 is nested too deeply"),
        ("a.json", "[", r"a\.json cannot be read"),
        ("a.json", "[]", "holds 0 tokens, 8 are needed"),
        ("a.json", '{\n"text": "a"\n}', r"a\.json:1 is not JSON; expected one record a line"),
        ("a.json", '{"data": []}', "record 0 has no field `text`, it has: data"),
        ("a.jsonl.gz", "no gzip", r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-9] + bytes(9), r"a\.jsonl\.gz cannot be read: "),
        ("a.jsonl.gz", gzip.compress(b"")[:10] + bytes([255] * 30), r"a\.jsonl\.gz cannot be read: "),
        ("a.parquet", "PAR1", r"a\.parquet cannot be read"),
        ("a.parquet", "", r"a\.parquet cannot be read"),
        ("a.safetensors", "junk", r"a\.safetensors cannot be read"),
        ("a.safetensors", "", r"a\.safetensors cannot be read"),
    ],
)
def test_damaged_files_are_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as caught:
        _evaluate([Source(source=str(tmp_path / name))], tokenizer)
    assert "\n" not in str(caught.value)


def test_a_line_without_an_end(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(records, "RECORD_LIMIT", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' + bytes(1 << 20)))
    with pytest.raises(UsageError, match=r"a\.jsonl\.gz:2 has more than 1,000 characters; expected one record a line"):
        _evaluate([Source(source=str(tmp_path / "a.jsonl.gz"))], tokenizer)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b"9" * (1 << 20)))
    with pytest.raises(UsageError, match=r"a\.json\.gz cannot be read: record 0 is not JSON, or has too many characters"):
        _evaluate([Source(source=str(tmp_path / "a.json.gz"))], tokenizer)


@pytest.mark.parametrize("read", [1, 2, 7, 64, 1000])
def test_a_json_list_is_read_on_as_it_is_needed(tmp_path, tokenizer, texts, monkeypatch, read):
    monkeypatch.setattr(records, "_READ", read)
    values = [*({"text": text, "n": [i, {"k": "]},["}]} for i, text in enumerate(texts)), {"text": ""}]
    for name, indent in (("a.json", None), ("b.json", 3)):
        (tmp_path / name).write_text(f" \n{json.dumps(values, indent=indent, ensure_ascii=False)} \n", encoding="utf-8")
        assert list(records.local_records(tmp_path / name, "train")) == values
    (tmp_path / "c.json").write_text("[12, 3.5e1,\n-7 , null,true]", encoding="utf-8")
    assert list(records.local_records(tmp_path / "c.json", "train")) == [12, 35.0, -7, None, True]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name):
    values = [{"text": "a"}, {"text": "b"}]
    text = json.dumps(values) if name == "a.json" else "\n".join(map(json.dumps, values))
    content = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(records.local_records(tmp_path / name, "train")) == values


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".parquet", ".safetensors"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, tokenizer, suffix):
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    device = tmp_path / f"device{suffix}"
    device.symlink_to("/dev/zero")
    for item, kind in ((Source(source=str(path)), "a pipe"), (Source(source=str(device)), "a device")):
        for refuse in (lambda item: text_sources.check(item, True), lambda item: _evaluate([item], tokenizer)):
            with pytest.raises(UsageError, match=f"{item.source} is {kind}; expected a file"):
                refuse(item)
    preset = Source(source="c4", path=str(path))
    with pytest.raises(UsageError, match="is a pipe; expected a file"):
        text_sources.check(preset, True)


def test_a_pipe_in_a_folder_of_a_dataset(tmp_path, tokenizer):
    item = _write(tmp_path, "folder", [{"text": "a"}])
    (Path(item.source) / "state.json").unlink()
    os.mkfifo(Path(item.source) / "state.json")
    with pytest.raises(UsageError, match=r"state\.json is a pipe; expected a file"):
        _evaluate([item], tokenizer)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", "{"), ("state.json", "[]"), ("state.json", "{}"), ("dataset_info.json", "7"), ("*.arrow", "junk"),
        ("state.json", '{"_data_files": [{"filename": "none"}]}'), ("*.arrow", ""),
        ("dataset_info.json", '{"features": {"text": {"_type": "Nothing"}}}'),
    ],
)  # fmt: skip
def test_a_damaged_folder_of_a_dataset(tmp_path, tokenizer, file, content):
    item = _write(tmp_path, "folder", [{"text": "some words " * 20}])
    (found,) = Path(item.source).glob(file)
    found.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"records\.folder cannot be read: "):
        _evaluate([item], tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~nosuchuser/a.txt", "~nosuchuser/a.txt: there is no such user"),
        ("a" * 300 + ".txt", "File name too long"),
        ("a" * 5000, r"a\.\.\. \(5000 characters\)' is not a path: File name too long"),
        ("a\0.txt", "is not a path: embedded null byte"),
        ("{file}/a.txt", "no such file"),
    ],
)
def test_paths_that_no_system_opens(tmp_path, name, message):
    (tmp_path / "file").write_text("a", encoding="utf-8")
    name = name.format(file=tmp_path / "file")
    with pytest.raises(UsageError, match=message):
        text_sources.check(Source(source=name), evaluating=False)
    with pytest.raises(UsageError, match=message):
        text_sources.check(Source(source="c4", path=name), evaluating=False)


def test_chat_messages_go_through_the_template(tmp_path, tokenizer):
    chats = [[{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "answer"}] for i in range(9)]
    item = _write(tmp_path, "jsonl", [{"chat": chat, "text": "unused"} for chat in chats])
    item = item.model_copy(update={"messages_key": "chat"})
    with pytest.raises(UsageError, match="messages_key needs a chat template and the tokenizer has none; use text_key"):
        _evaluate([item], tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    rendered = [f"[user] question {i}\n[assistant] answer\n" for i in range(9)]
    assert list(text_sources.documents(item, False, tokenizer)) == rendered
    windows = _cut([token for text in rendered for token in _ids(tokenizer, text)], 8)
    assert sorted(_calibrate([item], tokenizer, len(windows), 8).tolist()) == sorted(windows)


@pytest.mark.parametrize("chat", [None, [], "hello", [{"from": "user", "value": "hello"}]])
def test_messages_that_are_none_name_their_record(tmp_path, tokenizer, chat):
    good = [{"role": "user", "content": "hello"}]
    item = _write(tmp_path, "jsonl", [{"chat": good}, {"chat": chat}]).model_copy(update={"messages_key": "chat"})
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    with pytest.raises(UsageError, match=r"records\.jsonl: record 1, field `chat`: (expected a list|message 0 has no)"):
        _evaluate([item], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UsageError, match=r"records\.jsonl: record 0, field `chat`: the tokenizer's chat template cannot render"):
        _evaluate([item], tokenizer)


def test_tokens_of_one_row(tmp_path, tokenizer):
    item = _counting(tmp_path, "ids", 100, 83)
    text_sources.check(item, evaluating=True)
    assert torch.equal(_evaluate([item], tokenizer, 16), torch.arange(100, 180).view(5, 16))
    assert sorted(_calibrate([item], tokenizer, 5, 16).tolist()) == _cut(list(range(100, 183)), 16)


def test_tokens_in_rows(tmp_path, tokenizer):
    file = tmp_path / "rows.safetensors"
    ids = torch.arange(60, dtype=torch.int32).view(3, 20)
    save_file({"input_ids": ids, "other": torch.zeros(1)}, file)
    item = Source(source=str(file))
    assert sorted(_calibrate([item], tokenizer, 3, 16).tolist()) == ids[:, :16].tolist()
    assert torch.equal(_evaluate([item], tokenizer, 16), torch.arange(48).view(3, 16))
    assert _calibrate([item], tokenizer, 3, 16).dtype == torch.int64
    with pytest.raises(UsageError, match="rows of input_ids have 20 tokens, 32 are needed"):
        _calibrate([item], tokenizer, 1, 32)


@pytest.mark.parametrize("tensors", [{"ids": torch.arange(64)}, {"input_ids": torch.rand(64), "ids": torch.arange(64)}])
def test_token_files_without_integer_ids(tmp_path, tokenizer, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"expected an integer tensor `input_ids`, it has: .*ids"):
        _evaluate([Source(source=str(tmp_path / "a.safetensors"))], tokenizer)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor(7), r"input_ids have the shape \[\], expected \[tokens\] or \[rows, tokens\]"),
        (torch.zeros(2, 3, 16, dtype=torch.int64), r"input_ids have the shape \[2, 3, 16\]"),
        (torch.ones(64, dtype=torch.bool), r"expected an integer tensor `input_ids`, it has: input_ids \(input_ids are bool\)"),
        (torch.ones(64, dtype=torch.float16), r"input_ids are float16"),
        (torch.ones(64, dtype=torch.complex64), r"input_ids are complex64"),
        (torch.tensor([], dtype=torch.int64), "holds 0 tokens"),
        (torch.zeros(0, 16, dtype=torch.int64), "holds 0 tokens"),
        (torch.zeros(3, 0, dtype=torch.int64), "(holds 0 tokens|rows of input_ids have 0 tokens)"),
        (torch.full((64,), -3, dtype=torch.int8), "token ids begin at -3, the vocabulary at 0; wrong tokenizer"),
        (torch.full((64,), 2**63 + 5, dtype=torch.uint64), "token ids begin at -9223372036854775803, the vocabulary at 0"),
        (torch.full((64,), 2**60), "token ids reach 1152921504606846976"),
    ],
)
def test_token_files_of_odd_shapes_and_kinds(tmp_path, tokenizer, ids, message):
    save_file({"input_ids": ids}, tmp_path / "a.safetensors")
    item = Source(source=str(tmp_path / "a.safetensors"))
    with pytest.raises(UsageError, match=message):
        _evaluate([item], tokenizer)
    with pytest.raises(UsageError, match=message):
        _calibrate([item], tokenizer, 2, 8)


def test_a_start_token_outside_the_vocabulary(tmp_path, tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<beyond>"})
    item = _counting(tmp_path, "ids", 0, 64)
    with pytest.raises(UsageError, match="token ids reach 400, the vocabulary ends at 399"):
        _calibrate([item], tokenizer, 2, 16, bos=True, vocab=400)


def test_what_check_refuses(tmp_path):
    (tmp_path / "a.csv").write_text("a", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for item, evaluating, message in [
        (Source(source="builtin:evaluation/poems"), True, "no such bundled text; valid: builtin:calibration, "),
        (Source(source="wikitext3"), False, "source wikitext3: no such file; presets: wikitext2, ptb, c4, redpajama; also"),
        (Source(source="ptb", path=str(tmp_path / "no.jsonl")), False, r"no\.jsonl: no such file"),
        (Source(source=str(tmp_path / "a.csv")), False, r"unknown kind '\.csv'; expected \.txt"),
        (Source(source=str(tmp_path / "folder")), False, "is a folder but not a dataset written by save_to_disk"),
        (Source(source="generate:"), True, "cannot be evaluated on text of its own"),
        (Source(source="redpajama"), True, "redpajama has no evaluation part"),
    ]:
        with pytest.raises(UsageError, match=message):
            text_sources.check(item, evaluating)
    for name in ("builtin:calibration", "builtin:evaluation/novels", "generate:", "hub:some/data", "hub:data_1.x", "c4"):
        text_sources.check(Source(source=name), evaluating=False)


@pytest.mark.parametrize(
    "name", ["", "../x", "a b", "a/b/c", "/", "/etc", "a/", "a--b", "a..b", "~", "a" * 97, "a\n", "é", "-a", ".x/y"]
)
def test_names_that_no_dataset_of_the_hub_has(name):
    with pytest.raises(UsageError, match="expected hub:NAME or hub:OWNER/NAME") as caught:
        text_sources.check(Source(source=f"hub:{name}"), evaluating=False)
    assert "\n" not in str(caught.value)


def test_without_a_network_the_hub_is_not_asked(tokenizer, monkeypatch):
    def unknown(host, port):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("datasets.load_dataset", lambda *of, **more: pytest.fail("asked"))
    with pytest.raises(UsageError, match=r"dataset some/data cannot be read .*: there is no network, .* give a local file"):
        _evaluate([Source(source="hub:some/data")], tokenizer)


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4", "hub:some/data"])
def test_the_hub_out_of_reach_is_one_message(tokenizer, monkeypatch, name):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for use in (_evaluate, lambda *of: _calibrate(*of, 2, 8)):
        with pytest.raises(UsageError, match=r"cannot be read from the Hugging Face hub: .*Without a network give a") as caught:
            use([Source(source=name)], tokenizer)
        assert "\n" not in str(caught.value)
        assert name.removeprefix("hub:") in str(caught.value) or PRESETS[name].repository in str(caught.value)


def _preset(tmp_path: Path, name: str, texts: list[str]) -> Source:
    """A preset on a local file with its schema."""
    item = _write(tmp_path, "jsonl", [{PRESETS[name].key: text, "meta": "unused"} for text in texts])
    return Source(source=name, path=item.source)


@pytest.mark.parametrize(("name", "key", "joiner"), [("wikitext2", "text", "\n\n"), ("ptb", "sentence", " ")])
def test_presets_of_joined_records(tmp_path, tokenizer, texts, name, key, joiner):
    assert PRESETS[name].key == key
    item = _preset(tmp_path, name, texts)
    windows = _cut(_ids(tokenizer, joiner.join(texts)), 8)
    assert _evaluate([item], tokenizer).tolist() == windows
    assert sorted(_calibrate([item], tokenizer, len(windows), 8).tolist()) == sorted(windows)


@pytest.mark.parametrize("name", ["c4", "redpajama"])
def test_presets_of_windows_within_records(tmp_path, tokenizer, name):
    texts = [_text(seed, 10 if seed % 2 else 120) for seed in range(40)]
    length = 64
    ids = [_ids(tokenizer, text) for text in texts]
    long = [i for i, found in enumerate(ids) if len(found) > length]
    assert long == list(range(0, 40, 2))
    item = _preset(tmp_path, name, texts)

    places = []
    for row in _calibrate([item], tokenizer, 10, length).tolist():
        found = [(i, s) for i in long for s in range(len(ids[i]) - length) if ids[i][s : s + length] == row]
        assert len(found) == 1, "a window lies within one record and leaves at least its last token"
        places += found
    assert len({record for record, _ in places}) == 10, "no record gives two windows"
    assert [record for record, _ in places] != sorted(record for record, _ in places)
    assert len({start for _, start in places}) > 5
    with pytest.raises(UsageError, match=r"holds 20 records of more than 64 tokens, 21 are needed"):
        _calibrate([item], tokenizer, 21, length)


def test_a_record_must_be_longer_than_a_window(tmp_path, tokenizer):
    text = _text(0, 30)
    ids = _ids(tokenizer, text)
    item = _preset(tmp_path, "c4", [text])
    with pytest.raises(UsageError, match="holds 0 records of more than"):
        _calibrate([item], tokenizer, 1, len(ids))
    for seed in range(8):
        assert _calibrate([item], tokenizer, 1, len(ids) - 1, seed).tolist() == [ids[:-1]]


def test_windows_within_records_come_from_the_first_long_ones(tmp_path, tokenizer):
    texts = [_text(seed, 60) for seed in range(40)]
    ids = [_ids(tokenizer, text) for text in texts]
    item = _preset(tmp_path, "c4", texts)
    for row in _calibrate([item], tokenizer, 2, 32).tolist():
        assert any(ids[i][s : s + 32] == row for i in range(8) for s in range(len(ids[i]) - 32))


def test_c4_is_evaluated_on_its_first_documents(tmp_path, tokenizer, monkeypatch):
    assert (PRESETS["c4"].evaluation_records, PRESETS["c4"].evaluation_tokens) == (1100, 256 * 2048)
    texts = [f"{i} {_text(i, 3)}" for i in range(1105)]
    item = _preset(tmp_path, "c4", texts)
    ids = _ids(tokenizer, " ".join(texts[:1100]))
    assert _evaluate([item], tokenizer, 64).tolist() == _cut(ids, 64)
    monkeypatch.setitem(PRESETS, "c4", dataclasses.replace(PRESETS["c4"], evaluation_tokens=1000))
    assert _evaluate([item], tokenizer, 64).tolist() == _cut(ids[:1000], 64)


@pytest.mark.parametrize("count", [3, 12])
def test_windows_do_not_overlap(tmp_path, tokenizer, count):
    rows = _calibrate([_counting(tmp_path, "ids", 0, 100)], tokenizer, count, 8)
    assert rows.shape == (count, 8)
    assert all(row[0] % 8 == 0 and row == list(range(row[0], row[0] + 8)) for row in rows.tolist())
    assert len({row[0] for row in rows.tolist()}) == count


def test_the_seed_chooses_the_windows(tmp_path, tokenizer):
    sources = [_counting(tmp_path, "a", 0, 4000), _counting(tmp_path, "b", 5000, 4000)]
    first = _calibrate(sources, tokenizer, 16, 8, seed=1)
    assert torch.equal(_calibrate(sources, tokenizer, 16, 8, seed=1), first)
    assert not torch.equal(_calibrate(sources, tokenizer, 16, 8, seed=2), first)
    starts = (_calibrate(sources[:1], tokenizer, 16, 8, seed=seed)[:, 0].tolist() for seed in range(20))
    assert max(start for found in starts for start in found) > 3000, "windows come from all of the text"


def test_bos(tmp_path, tokenizer):
    item = _counting(tmp_path, "ids", 1000, 63)
    rows = _calibrate([item], tokenizer, 9, 8, bos=True)
    assert rows[:, 0].tolist() == [tokenizer.bos_token_id] * 9
    assert sorted(rows[:, 1:].tolist()) == _cut(list(range(1000, 1063)), 7)
    rows = _evaluate([item], tokenizer, 8, bos=True)
    assert rows[:, 0].tolist() == [tokenizer.bos_token_id] * 9
    assert torch.equal(rows[:, 1:].flatten(), torch.arange(1000, 1063))
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match=r"data\.calibration: bos is true and the tokenizer has no BOS token; set bos: false"):
        _calibrate([item], tokenizer, 9, 8, bos=True)


def test_too_few_tokens_names_found_and_needed(tmp_path, tokenizer):
    item = _counting(tmp_path, "ids", 0, 4095)
    with pytest.raises(UsageError, match=r"data\.calibration: .*ids\.safetensors holds 4,095 tokens, 4,096 are needed \(64 seq"):
        _calibrate([item], tokenizer, 64, 64)
    assert _calibrate([item], tokenizer, 63, 64).shape == (63, 64)
    with pytest.raises(UsageError, match=r"data\.evaluation text: .* holds 4,095 tokens, 4,096 are needed \(64 segments x 64\)"):
        _evaluate([item], tokenizer, 64, 64)
    with pytest.raises(UsageError, match=r"holds 4,095 tokens, 5,000 are needed \(1 segments x 5000\)"):
        _evaluate([item], tokenizer, 5000)


def test_token_ids_outside_the_vocabulary(tmp_path, tokenizer):
    item = _counting(tmp_path, "ids", 0, 64)
    assert _evaluate([item], tokenizer, vocab=64).max() == 63
    with pytest.raises(UsageError, match=r"data\.evaluation text: token ids reach 63, the vocabulary ends at 62; wrong tok"):
        _evaluate([item], tokenizer, vocab=63)
    with pytest.raises(UsageError, match=r"data\.calibration: token ids reach 63, the vocabulary ends at 62"):
        _calibrate([item], tokenizer, 8, 8, vocab=63)
    with pytest.raises(UsageError, match="wrong tokenizer"):
        _evaluate([_counting(tmp_path, "negative", -1, 64)], tokenizer)


def _streamed(monkeypatch, texts: list[str]) -> None:
    """The hub has these documents, in every dataset."""
    monkeypatch.setattr("datasets.load_dataset", lambda *of, **more: iter([{"text": text} for text in texts]))


@pytest.mark.parametrize("batch", [1, 3, 16, 256])
@pytest.mark.parametrize("sets", [(6, 5), (6, 5, 4), (1, 9, 1, 2)])
def test_fresh_text_of_the_hub_is_no_text_that_another_set_chose_from(tokenizer, monkeypatch, batch, sets):
    monkeypatch.setattr(encode, "BATCH", batch)
    texts = [f"{number:05d} " * (1 + 7 * number % 20) for number in range(6000)]
    _streamed(monkeypatch, texts)
    place = {}
    for number, text in enumerate(texts):
        place.setdefault(text[:5], number)
    item = Source(source="hub:some/data")
    seen: set[int] = set()
    for index, count in enumerate(sets):
        taken = [sets[:index]] if index else []
        found: set[int] = set()
        for seed in range(6):  # other seeds choose other windows of the same text
            rows = _calibrate([item], tokenizer, count, 32, seed=seed, taken=taken)
            found |= {place[word] for row in rows.tolist() for word in tokenizer.decode(row).split() if word in place}
        assert found
        if seen:
            # A record may be cut where a batch of it is not: batches are whole records.
            assert min(found) > max(seen)
        seen |= found


def test_of_sets_that_do_not_follow_each_other_the_last_counts(tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 4)
    _streamed(monkeypatch, [f"{number:05d} " * 9 for number in range(6000)])
    item = Source(source="hub:some/data")
    both = _calibrate([item], tokenizer, 3, 32, taken=[(2,), (9, 2), ()])
    assert torch.equal(both, _calibrate([item], tokenizer, 3, 32, taken=[(9, 2)]))
    assert not torch.equal(both, _calibrate([item], tokenizer, 3, 32, taken=[(9,)]))


def test_what_training_reads_of_the_hub(tokenizer, monkeypatch):
    texts = [_text(number, 30) for number in range(40)]
    _streamed(monkeypatch, texts)
    monkeypatch.setattr(encode, "BATCH", 16)
    whole = [_ids(tokenizer, text + "\n\n") for text in texts]
    # Whole batches of documents, until there are four times as many tokens as are needed.
    read = next(whole[: 16 * n] for n in (1, 2, 3) if sum(map(len, whole[: 16 * n])) >= 4 * 24 * 8)
    windows = torch.tensor(_cut([token for ids in read for token in ids], 8))
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(3))[:24]
    assert torch.equal(_calibrate([Source(source="hub:some/data")], tokenizer, 24, 8, seed=3), windows[chosen])


def test_too_little_text_beside_what_another_set_reads(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 2)
    texts = [_text(number, 30) for number in range(10)]
    _streamed(monkeypatch, texts)
    counts = [len(_ids(tokenizer, text + "\n\n")) for text in texts]
    pairs = [sum(counts[i : i + 2]) for i in range(0, 10, 2)]
    assert pairs[0] >= 4 * 2 * 16
    message = f"holds {sum(counts) - pairs[0]:,} tokens after the {pairs[0]:,} that another set reads, 4,000 are needed"
    with pytest.raises(UsageError, match=message):
        _calibrate([Source(source="hub:some/data")], tokenizer, 250, 16, taken=[(2,)])
    with pytest.raises(UsageError, match=f"holds 0 tokens after the {sum(counts):,} that another set reads"):
        _calibrate([Source(source="hub:some/data")], tokenizer, 2, 16, taken=[(250,)])
    item = _preset(tmp_path, "c4", texts)
    with pytest.raises(UsageError, match="holds 10 records of more than 16 tokens, the first 8 of them for another set, 3 "):
        _calibrate([item], tokenizer, 3, 16, taken=[(2,)])
    with pytest.raises(UsageError, match="holds 10 records of more than 16 tokens, the first 10 of them for another set, 1 "):
        _calibrate([item], tokenizer, 1, 16, taken=[(3,)])


def test_fresh_records_are_none_of_another_set(tmp_path, tokenizer):
    texts = [f"{number:05d} " * 30 for number in range(60)]
    item = _preset(tmp_path, "c4", texts)
    first = {word for seed in range(8) for row in _calibrate([item], tokenizer, 4, 32, seed).tolist()
             for word in tokenizer.decode(row).split() if len(word) == 5}  # fmt: skip
    fresh = {word for seed in range(8) for row in _calibrate([item], tokenizer, 4, 32, seed, taken=[(4,)]).tolist()
             for word in tokenizer.decode(row).split() if len(word) == 5}  # fmt: skip
    assert max(first) < min(fresh)


def _largest_remainders(weights: list[float], total: int) -> list[int]:
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    while sum(counts) < total:
        gaps = [value - count for value, count in zip(exact, counts, strict=True)]
        counts[gaps.index(max(gaps))] += 1
    return counts


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [([5, 3, 2], 7, [4, 2, 1]), ([1, 1, 1], 8, [3, 3, 2]), ([0.9, 0.05, 0.05], 4, [4, 0, 0]), ([1, 6], 32, [5, 27])],
)
def test_a_mixture_counts_by_largest_remainders(tmp_path, tokenizer, weights, total, expected):
    assert _largest_remainders(weights, total) == expected
    sources = [
        _counting(tmp_path, str(i), 1000 * i, 400).model_copy(update={"weight": weight}) for i, weight in enumerate(weights)
    ]
    rows = _calibrate(sources, tokenizer, total, 8)
    which = [row[0] // 1000 for row in rows.tolist()]
    assert [which.count(i) for i in range(len(weights))] == expected
    assert len({row[0] for row in rows.tolist()}) == total
    for prefix in range(1, total + 1):
        for i, count in enumerate(expected):
            assert abs(which[:prefix].count(i) - prefix * count / total) <= 1, "every prefix is mixed"


def test_generated_text_is_asked_for_its_share(tmp_path, tokenizer):
    asked = []

    def sample(item: Source, rows: int, length: int) -> Tensor:
        asked.append((item.temperature, rows, length))
        return torch.full((rows, length), 7)

    generated = Source(source="generate:", temperature=0.5)
    counting = _counting(tmp_path, "ids", 1000, 400)
    rows = _calibrate([generated, counting], tokenizer, 8, 16, bos=True, sampler=sample)
    assert asked == [(0.5, 4, 15)]
    assert rows[:, 1].tolist()[::2] == [7] * 4
    assert rows.shape == (8, 16)
    _calibrate([generated.model_copy(update={"weight": 0.001}), counting], tokenizer, 8, 16)


def test_the_bundled_calibration_text_is_its_styles_in_equal_shares(tokenizer, monkeypatch):
    monkeypatch.setattr(text_sources, "builtin_records", lambda *of: islice(builtin_records(*of), 12))
    rows = _calibrate([Source(source="builtin:calibration")], tokenizer, 9, 64)
    whole = {style: "".join(r["text"] + "\n\n" for r in islice(builtin_records("calibration", style), 12)) for style in STYLES}
    found = []
    for row in rows.tolist():
        (style,) = (style for style, text in whole.items() if tokenizer.decode(row).strip("\ufffd") in text)
        found.append(style)
    assert found == list(STYLES) * 3

    expanded = text_sources.expand([Source(source="builtin:calibration", weight=6.0), Source(source="c4", weight=2.0)])
    assert [(item.source, item.weight) for item in expanded] == [
        *((f"builtin:calibration/{style}", 2.0) for style in STYLES),
        ("c4", 2.0),
    ]


def test_segments_start_at_the_start_of_the_text(tokenizer):
    text = next(builtin_records("evaluation", "technical"))["text"]
    ids = _ids(tokenizer, text + "\n\n")
    rows = _evaluate([Source(source="builtin:evaluation/technical")], tokenizer, 32, 5)
    assert rows.tolist() == _cut(ids, 32)[:5]
    assert rows.dtype == torch.int64


def test_segments_of_several_sources_follow_each_other(tmp_path, tokenizer):
    sources = [_counting(tmp_path, "a", 0, 20), _counting(tmp_path, "b", 20, 20)]
    assert torch.equal(_evaluate(sources, tokenizer, 8), torch.arange(40).view(5, 8))
    weighted = [item.model_copy(update={"weight": weight}) for item, weight in zip(sources, (2.0, 1.0), strict=True)]
    with pytest.raises(UsageError, match="weights are shares of its segments; set segments"):
        _evaluate(weighted, tokenizer, 8)


def test_several_sources_share_the_segments(tmp_path, tokenizer):
    sources = [_counting(tmp_path, "a", 0, 20), _counting(tmp_path, "b", 20, 20)]
    weighted = [item.model_copy(update={"weight": weight}) for item, weight in zip(sources, (2.0, 1.0), strict=True)]
    expected = torch.cat([torch.arange(16), torch.arange(20, 28)]).view(3, 8)
    assert torch.equal(_evaluate(weighted, tokenizer, 8, 3), expected)
    # The first text alone would do for one segment of each.
    assert torch.equal(_evaluate(sources, tokenizer, 8, 2), expected[[0, 2]])
    with pytest.raises(UsageError, match=r"a\.safetensors holds 20 tokens, 24 are needed \(3 segments x 8\)"):
        _evaluate(sources, tokenizer, 8, 6)
    styles = [Source(source=f"builtin:evaluation/{style}") for style in STYLES]
    whole = _evaluate([Source(source="builtin:evaluation")], tokenizer, 32, 6)
    assert torch.equal(whole, torch.cat([_evaluate([style], tokenizer, 32, 2) for style in styles]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "wikitext2", "split": "validation"}, "wikitext2 does not read split; its parts are those of the papers"),
        ({"source": "c4", "config": "de", "text_key": "body"}, "c4 does not read text_key, config; its parts"),
        ({"source": "builtin:evaluation", "split": "test"}, "does not read split"),
        ({"source": "records.jsonl", "path": "other.jsonl"}, "does not read path"),
        ({"source": "hub:some/text", "temperature": 0.5}, "does not read temperature"),
    ],
)
def test_a_key_that_a_source_does_not_read_is_refused(keys, message):
    with pytest.raises(UsageError, match=message):
        text_sources.check(Source(**keys), evaluating=True)


def test_the_hash_covers_content_and_shape():
    tokens = torch.arange(6).view(2, 3)
    expected = hashlib.sha256(b"(2, 3)" + b"".join(i.to_bytes(8, "little") for i in range(6))).hexdigest()
    assert data.tokens_hash(tokens) == expected
    assert data.tokens_hash(tokens.t().contiguous().t()) == expected
    changed = tokens.clone()
    changed[1, 2] = 9
    others = [changed, tokens.view(3, 2), tokens.view(6), tokens.flip(0)]
    assert Counter(data.tokens_hash(other) for other in (tokens, *others)).most_common(1)[0][1] == 1


def test_compressed_json_lines_read_as_the_plain_file_does(tmp_path, tokenizer):
    lines = "".join(json.dumps({"text": f"record {i} of many words"}) + "\n" for i in range(40))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "b.json.gz", "wt", encoding="utf-8") as packed:
        packed.write(lines)
    rows = []
    for name in ("a.jsonl", "b.json.gz"):
        spec = EvaluationSet(name="x", source=[Source(source=str(tmp_path / name))], length=16, segments=4)
        text_sources.check(spec.source[0], evaluating=True)
        rows.append(data.evaluation_tokens(spec, tokenizer, 100_000))
    assert torch.equal(*rows)


def test_a_compressed_file_that_ends_too_early(tmp_path, tokenizer):
    whole = gzip.compress(json.dumps({"text": "some words " * 50}).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"a\.jsonl\.gz cannot be read: "):
        list(text_sources.documents(Source(source=str(tmp_path / "a.jsonl.gz")), False, tokenizer))
