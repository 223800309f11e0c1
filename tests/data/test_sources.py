"""Sources by name: presets, chat messages, keys that a source reads."""

import dataclasses

import pytest
from texts import calibrate, cut, evaluate, ids_of, preset, words_of, written

from lbllm_cli.core.errors import UsageError
from lbllm_cli.data import sources as text_sources
from lbllm_cli.data.presets import PRESETS
from lbllm_cli.recipe.text import Source


def test_chat_messages_go_through_the_template(tmp_path, tokenizer):
    chats = [[{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "answer"}] for i in range(9)]
    item = written(tmp_path, "jsonl", [{"chat": chat, "text": "unused"} for chat in chats])
    item = item.model_copy(update={"messages_key": "chat"})
    with pytest.raises(UsageError, match="messages_key needs a chat template and the tokenizer has none; use text_key"):
        evaluate([item], tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    rendered = [f"[user] question {i}\n[assistant] answer\n" for i in range(9)]
    assert list(text_sources.documents(item, False, tokenizer)) == rendered
    windows = cut([token for text in rendered for token in ids_of(tokenizer, text)], 8)
    assert sorted(calibrate([item], tokenizer, len(windows), 8).tolist()) == sorted(windows)
    # What is measured is what is trained on: nothing is put between conversations there either.
    assert evaluate([item], tokenizer, 8).tolist() == windows


@pytest.mark.parametrize("chat", [None, [], "hello", [{"from": "user", "value": "hello"}]])
def test_messages_that_are_none_name_their_record(tmp_path, tokenizer, chat):
    good = [{"role": "user", "content": "hello"}]
    item = written(tmp_path, "jsonl", [{"chat": good}, {"chat": chat}]).model_copy(update={"messages_key": "chat"})
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    with pytest.raises(UsageError, match=r"records\.jsonl: record 2, field `chat`: (expected a list|message 1 has no)"):
        evaluate([item], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UsageError, match=r"records\.jsonl: record 1, field `chat`: the tokenizer's chat template cannot render"):
        evaluate([item], tokenizer)


@pytest.mark.parametrize("form", ["numpy", "torch", "arrow"])
def test_messages_of_a_folder_that_was_saved_with_a_form(tmp_path, tokenizer, form):
    import datasets

    chats = [[{"role": "user", "content": f"question {i}"}] for i in range(3)]
    datasets.Dataset.from_list([{"chat": chat} for chat in chats]).with_format(form).save_to_disk(str(tmp_path / "chats"))
    item = Source(source=str(tmp_path / "chats"), messages_key="chat")
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert list(text_sources.documents(item, False, tokenizer)) == ["question 0", "question 1", "question 2"]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UsageError, match="chats: record 1, field `chat`: the tokenizer's chat template cannot render"):
        evaluate([item], tokenizer)


def test_what_check_refuses(tmp_path):
    (tmp_path / "a.csv").write_text("a", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for item, evaluating, message in [
        (Source(source="builtin:evaluation/poems"), True, "no such bundled text; valid: builtin:calibration, "),
        (Source(source="wikitext3"), False, "source wikitext3: no such file; presets: wikitext2, ptb, c4, fineweb-edu, slim"),
        (Source(source="ptb", path=str(tmp_path / "no.jsonl")), False, r"no\.jsonl: no such file"),
        (Source(source=str(tmp_path / "a.csv")), False, r"unknown kind '\.csv'; expected \.txt"),
        (Source(source=str(tmp_path / "folder")), False, "is a folder but not a dataset written by save_to_disk"),
        (Source(source="generate:"), True, "cannot be evaluated on text of its own"),
        (Source(source="redpajama"), True, "redpajama has no evaluation part"),
    ]:
        with pytest.raises(UsageError, match=message):
            text_sources.check(item, evaluating)
    for name in ("builtin:calibration", "builtin:training/modern", "generate:", "hub:some/data", "hub:data_1.x", "c4"):
        text_sources.check(Source(source=name), evaluating=False)


@pytest.mark.parametrize(("name", "key", "joiner"), [("wikitext2", "text", "\n\n"), ("ptb", "sentence", " ")])
def test_presets_of_joined_records(tmp_path, tokenizer, texts, name, key, joiner):
    assert PRESETS[name].key == key
    item = preset(tmp_path, name, texts)
    windows = cut(ids_of(tokenizer, joiner.join(texts)), 8)
    assert evaluate([item], tokenizer).tolist() == windows
    assert sorted(calibrate([item], tokenizer, len(windows), 8).tolist()) == sorted(windows)


@pytest.mark.parametrize("name", ["c4", "redpajama"])
def test_presets_of_windows_within_records(tmp_path, tokenizer, name):
    texts = [words_of(seed, 10 if seed % 2 else 120) for seed in range(40)]
    length = 64
    ids = [ids_of(tokenizer, text) for text in texts]
    long = [i for i, found in enumerate(ids) if len(found) > length]
    assert long == list(range(0, 40, 2))
    item = preset(tmp_path, name, texts)

    places = []
    for row in calibrate([item], tokenizer, 10, length).tolist():
        found = [(i, s) for i in long for s in range(len(ids[i]) - length) if ids[i][s : s + length] == row]
        assert len(found) == 1, "a window lies within one record and leaves at least its last token"
        places += found
    assert len({record for record, _ in places}) == 10, "no record gives two windows"
    assert [record for record, _ in places] != sorted(record for record, _ in places)
    assert len({start for _, start in places}) > 5
    with pytest.raises(UsageError, match=r"holds 20 records of more than 64 tokens, 21 are needed"):
        calibrate([item], tokenizer, 21, length)


def test_c4_is_evaluated_on_its_first_documents(tmp_path, tokenizer, monkeypatch):
    assert (PRESETS["c4"].evaluation_records, PRESETS["c4"].evaluation_tokens) == (1100, 256 * 2048)
    texts = [f"{i} {words_of(i, 3)}" for i in range(1105)]
    item = preset(tmp_path, "c4", texts)
    ids = ids_of(tokenizer, " ".join(texts[:1100]))
    assert evaluate([item], tokenizer, 64).tolist() == cut(ids, 64)
    monkeypatch.setitem(PRESETS, "c4", dataclasses.replace(PRESETS["c4"], evaluation_tokens=1000))
    assert evaluate([item], tokenizer, 64).tolist() == cut(ids[:1000], 64)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "wikitext2", "split": "validation"}, "wikitext2 does not read split; its parts are those of the papers"),
        ({"source": "c4", "config": "de", "text_key": "body"}, "c4 does not read text_key, config; its parts"),
        ({"source": "builtin:evaluation", "split": "test"}, "does not read split"),
        ({"source": "records.jsonl", "path": "other.jsonl"}, "does not read path"),
        ({"source": "hub:some/text", "temperature": 0.5}, "does not read temperature"),
        ({"source": "a.txt", "messages_key": "chat", "split": "test"}, "a.txt does not read messages_key, split"),
        ({"source": "a.jsonl", "split": "test"}, "a.jsonl does not read split"),
        ({"source": "a.safetensors", "text_key": "body"}, "a.safetensors does not read text_key"),
        ({"source": "ptb", "path": "a.jsonl", "split": "test"}, "ptb does not read split$"),
    ],
)
def test_a_key_that_a_source_does_not_read_is_refused(keys, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.jsonl", "a.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=message):
        text_sources.check(Source(**keys), evaluating=True)
