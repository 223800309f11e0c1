"""From named text to tokens: every kind of source, windows, mixtures, evaluation segments, refusals."""

import dataclasses
import gzip
import hashlib
import json
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

from lbllm_cli import data, text_sources
from lbllm_cli.errors import UsageError
from lbllm_cli.recipe import EvaluationSet, TokenSet
from lbllm_cli.recipe_base import Source
from lbllm_cli.text_sources import PRESETS, STYLES, builtin_records

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
    return data.training_tokens(spec, tokenizer, more.pop("vocab", VOCAB), seed, sampler, "data.calibration", **more)


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
    with pytest.raises(UsageError, match=r"a\.txt cannot be read: "):
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
        ("a.json", '[{"text": "a"},', r"a\.json cannot be read"),
        ("a.jsonl", '"text"\n', "record 0 has no field `text`, it has: str"),
        ("a.jsonl", '{"text": ["a"]}\n', "field `text` of record 0 is list, expected text"),
        ("a.jsonl", '{"text": null}\n', "field `text` of record 0 is NoneType, expected text"),
        ("a.parquet", "PAR1", r"a\.parquet cannot be read"),
        ("a.safetensors", "junk", r"a\.safetensors cannot be read"),
    ],
)
def test_damaged_files_are_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        _evaluate([Source(source=str(tmp_path / name))], tokenizer)


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
    for name in ("builtin:calibration", "builtin:evaluation/novels", "generate:", "hub:some/data", "c4"):
        text_sources.check(Source(source=name), evaluating=False)


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
