"""Records in files and folders of every kind, and files that are damaged or none."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from texts import KINDS, calibrate, cut, evaluate, ids_of, written

from lbllm_cli.core.errors import UsageError
from lbllm_cli.data import hub, records
from lbllm_cli.data import sources as text_sources
from lbllm_cli.data import tokens as data
from lbllm_cli.data.presets import PRESETS
from lbllm_cli.recipe.text import EvaluationSet, Source


@pytest.mark.parametrize("kind", KINDS)
def test_records_of_every_kind_give_the_same_text(tmp_path, tokenizer, texts, kind):
    item = written(tmp_path, kind, [{"id": i, "text": text} for i, text in enumerate(texts)])
    text_sources.check(item, evaluating=False)
    assert list(text_sources.documents(item, False, tokenizer)) == texts
    expected = cut([token for text in texts for token in ids_of(tokenizer, text + "\n\n")], 8)
    assert evaluate([item], tokenizer).tolist() == expected
    assert sorted(calibrate([item], tokenizer, len(expected), 8).tolist()) == sorted(expected)


def test_a_text_file_is_one_document(tmp_path, tokenizer, texts):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(texts), encoding="utf-8")
    assert evaluate([Source(source=str(file))], tokenizer).tolist() == cut(ids_of(tokenizer, "\n".join(texts) + "\n\n"), 8)
    file.write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(UsageError, match=r"a\.txt is not UTF-8 text: byte 3 cannot be decoded"):
        evaluate([Source(source=str(file))], tokenizer)


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
    item = written(tmp_path, "jsonl", [{"body": "first"}, {"body": "second"}])
    assert list(text_sources.documents(item.model_copy(update={"text_key": "body"}), False, tokenizer)) == ["first", "second"]


def test_a_missing_field_is_named_with_those_there_are(tmp_path, tokenizer):
    item = written(tmp_path, "jsonl", [{"text": "a", "title": "b"}, {"title": "c", "body": "d"}])
    with pytest.raises(UsageError, match=r"records\.jsonl: record 2 has no field `text`, it has: title, body; set text_key or"):
        evaluate([item], tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text"\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 50_000, r"a\.jsonl:2 is JSON that is nested too deeply"),
        ("a.jsonl", b'{"text": "\xe9"}\n', r"a\.jsonl cannot be read: 'utf-8' codec can't decode"),
        ("a.jsonl", "\0\0\0\0", r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", '{"text": "' + "9" * 20 + '", "n": ' + "9" * 5000 + "}", r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", '"text"\n', "record 1 has no field `text`, it has: str"),
        ("a.jsonl", "7\n", "record 1 has no field `text`, it has: int"),
        ("a.jsonl", "{}\n", "record 1 has no field `text`, it has: ; set"),
        ("a.jsonl", '{"text": ["a"]}\n', "record 1, field `text` is list, expected text"),
        ("a.jsonl", '{"text": null}\n', "record 1, field `text` is NoneType, expected text"),
        ("a.jsonl", '{"text": "a"}\n{"text": "a \\ud83d b"}\n', r"record 2, field `text` is no Unicode text: character 2"),
        ("a.jsonl", "", "holds 0 tokens, 8 are needed"),
        ("a.txt", "", "holds . tokens, 8 are needed"),
        ("a.json", '[{"text": "a"},', r"a\.json cannot be read: record 2 is not JSON"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', r"a\.json cannot be read: after record 1 the list does not"),
        ("a.json", '[{"text": "a"}] more', r"a\.json cannot be read: after record 1"),
        ("a.json", '[{"text": "a"}', r"a\.json cannot be read: record 1 is not JSON"),
        ("a.json", '[{"text": "a"}, ' + "[" * 50_000, r"a\.json cannot be read: record 2 is nested too deeply"),
        ("a.json", "[", r"a\.json cannot be read"),
        ("a.json", "[]", "holds 0 tokens, 8 are needed"),
        ("a.json", '{\n"text": "a"\n}', r"a\.json:1 is not JSON; expected one record a line"),
        ("a.json", '{"data": []}', "record 1 has no field `text`, it has: data"),
        ("a.jsonl.gz", "no gzip", r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9] + bytes(9), r"a\.jsonl\.gz cannot be read: "),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + bytes([255] * 30), r"a\.jsonl\.gz cannot be read: "),
        ("a.parquet", "PAR1", r"a\.parquet cannot be read"),
        ("a.parquet", "", r"a\.parquet cannot be read"),
        ("a.safetensors", "junk", r"a\.safetensors cannot be read"),
        ("a.safetensors", "", r"a\.safetensors cannot be read"),
    ],
)
def test_damaged_files_are_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as caught:
        evaluate([Source(source=str(tmp_path / name))], tokenizer)
    assert "\n" not in str(caught.value)


def test_a_line_without_an_end(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(records, "RECORD_LIMIT", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' + bytes(1 << 20)))
    with pytest.raises(UsageError, match=r"a\.jsonl\.gz:2 has more than 1,000 characters; expected one record a line"):
        evaluate([Source(source=str(tmp_path / "a.jsonl.gz"))], tokenizer)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b"9" * (1 << 20)))
    with pytest.raises(UsageError, match=r"a\.json\.gz cannot be read: record 1 is not JSON, or has too many characters"):
        evaluate([Source(source=str(tmp_path / "a.json.gz"))], tokenizer)


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
        for refuse in (lambda item: text_sources.check(item, True), lambda item: evaluate([item], tokenizer)):
            with pytest.raises(UsageError, match=f"{item.source} is {kind}; expected a file"):
                refuse(item)
    preset = Source(source="c4", path=str(path))
    with pytest.raises(UsageError, match="is a pipe; expected a file"):
        text_sources.check(preset, True)


def test_a_pipe_in_a_folder_of_a_dataset(tmp_path, tokenizer):
    item = written(tmp_path, "folder", [{"text": "a"}])
    (Path(item.source) / "state.json").unlink()
    os.mkfifo(Path(item.source) / "state.json")
    with pytest.raises(UsageError, match=r"state\.json is a pipe; expected a file"):
        evaluate([item], tokenizer)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", "{"), ("state.json", "[]"), ("state.json", "{}"), ("dataset_info.json", "7"), ("*.arrow", "junk"),
        ("state.json", '{"_data_files": [{"filename": "none"}]}'), ("*.arrow", ""),
        ("dataset_info.json", '{"features": {"text": {"_type": "Nothing"}}}'),
    ],
)  # fmt: skip
def test_a_damaged_folder_of_a_dataset(tmp_path, tokenizer, file, content):
    item = written(tmp_path, "folder", [{"text": "some words " * 20}])
    (found,) = Path(item.source).glob(file)
    found.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"records\.folder cannot be read: "):
        evaluate([item], tokenizer)


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


@pytest.mark.parametrize(
    "name", ["", "../x", "a b", "a/b/c", "/", "/etc", "a/", "a--b", "a..b", "~", "a" * 97, "a\n", "é", "-a", ".x/y"]
)
def test_names_that_no_dataset_of_the_hub_has(name):
    with pytest.raises(UsageError, match="expected hub:NAME or hub:OWNER/NAME") as caught:
        text_sources.check(Source(source=f"hub:{name}"), evaluating=False)
    assert "\n" not in str(caught.value)


def test_without_a_network_the_hub_is_not_asked(tokenizer, monkeypatch):
    def unknown(*place, **more):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    hub._unreachable.cache_clear()
    monkeypatch.setattr("datasets.load_dataset", lambda *of, **more: pytest.fail("asked"))
    with pytest.raises(UsageError, match=r"dataset some/data cannot be read .*: there is no network, .* give a local file"):
        evaluate([Source(source="hub:some/data")], tokenizer)


@pytest.mark.parametrize(
    ("proxies", "asked"),
    [({}, True), ({"no": "localhost"}, True), ({"http": "p:1"}, True), ({"https": "p:1"}, False), ({"all": "p:1"}, False)],
)
def test_behind_a_proxy_the_way_to_the_hub_is_not_tried(monkeypatch, proxies, asked):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
    monkeypatch.setattr(hub, "_unreachable", lambda *place: "tried")
    assert hub.no_network() == ("tried" if asked else None)


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4", "hub:some/data"])
def test_the_hub_out_of_reach_is_one_message(tokenizer, monkeypatch, name):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for use in (evaluate, lambda *of: calibrate(*of, 2, 8)):
        with pytest.raises(UsageError, match=r"cannot be read from the Hugging Face hub: .*Without a network give a") as caught:
            use([Source(source=name)], tokenizer)
        assert "\n" not in str(caught.value)
        assert name.removeprefix("hub:") in str(caught.value) or PRESETS[name].repository in str(caught.value)


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
