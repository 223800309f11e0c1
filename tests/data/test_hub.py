"""Presets read what the hub was recorded to hold, through the libraries that read the hub; and what its refusals become."""

import pytest
from hub_server import RECORDED, ROWS, content, serving, value_of
from texts import calibrate, evaluate

from lbllm_cli.core.errors import UsageError
from lbllm_cli.data import sources as text_sources
from lbllm_cli.data.presets import PRESETS
from lbllm_cli.recipe.text import Source

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
THERE = [name for name, preset in PRESETS.items() if not preset.instead]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub."""
    with serving(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def talking(tokenizer):
    """The tokenizer, with a chat template."""
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def said(name: str, file: str, row: int) -> str:
    """The text of a row of a recorded file."""
    value = value_of(RECORDED[name]["columns"][PRESETS[name].key], file, row)
    return value if isinstance(value, str) else "".join(f"[{m['role']}] {m['content']}\n" for m in value)


def test_every_preset_is_recorded():
    assert sorted(THERE) == sorted(RECORDED)
    for name, recorded in RECORDED.items():
        assert (recorded["repository"], recorded["revision"]) == (PRESETS[name].repository, PRESETS[name].revision or "main")


FILES = {
    "wikitext2": ("wikitext-2-raw-v1/train-00000-of-00001.parquet", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
    "ptb": ("penn_treebank/train/0000.parquet", "penn_treebank/test/0000.parquet"),
    "c4": ("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"),
    "fineweb-edu": ("sample/10BT/000_00000.parquet", None),
    "slimpajama": (
        "data/train-00000-of-00048-ab2b35705f029d94.parquet", "data/validation-00000-of-00001-4fb685c22a3f91ef.parquet"
    ),
    "dclm": (RECORDED["dclm"]["files"][0], None),
    "ultrachat": (
        "data/train_sft-00000-of-00003-a3ecf92756993583.parquet", "data/test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet"
    ),
    "smoltalk": ("data/all/train-00000-of-00009.parquet", "data/all/test-00000-of-00001.parquet"),
}  # fmt: skip


@pytest.mark.parametrize("name", THERE)
@pytest.mark.parametrize("evaluating", [False, True], ids=["calibration", "evaluation"])
def test_a_preset_reads_the_files_of_its_part(hub, talking, name, evaluating):
    hub.add(RECORDED[name])
    first = FILES[name][evaluating]
    item = Source(source=name)
    if first is None:
        with pytest.raises(UsageError, match=f"source {name} has no evaluation part; choose "):
            text_sources.check(item, evaluating)
        return
    text_sources.check(item, evaluating)
    found = list(text_sources.documents(item, evaluating, talking))
    assert found[:ROWS] == [said(name, first, row) for row in range(ROWS)]
    part = PRESETS[name].evaluation if evaluating else PRESETS[name].calibration
    head, tail = part.files.split("*") if "*" in part.files else (part.files, "")
    files = [file for file in sorted(RECORDED[name]["files"]) if file.startswith(head) and file.endswith(tail)]
    assert found == [said(name, file, row) for file in files for row in range(ROWS)]


@pytest.mark.parametrize("name", THERE)
def test_tokens_of_a_preset(hub, talking, name):
    hub.add(RECORDED[name])
    rows = calibrate([Source(source=name)], talking, 4, 64)
    assert rows.shape == (4, 64)
    assert len({tuple(row) for row in rows.tolist()}) == 4
    if PRESETS[name].evaluation:
        assert evaluate([Source(source=name)], talking, 64, 4).shape == (4, 64)


@pytest.mark.parametrize("name", THERE)
def test_a_column_that_is_called_otherwise(hub, talking, name):
    files = hub.add(RECORDED[name])
    key = PRESETS[name].key
    columns = {f"{column}_" if column == key else column: kind for column, kind in RECORDED[name]["columns"].items()}
    files.update({file: content(columns, file) for file in files})
    with pytest.raises(UsageError, match=f"{name}: record 1 has no field `{key}`, it has: .*{key}_"):
        calibrate([Source(source=name)], talking, 1, 32)


@pytest.mark.parametrize("name", THERE)
def test_a_file_that_is_there_no_more(hub, talking, name):
    files = hub.add(RECORDED[name])
    for file in list(files):
        files[f"moved/{file}"] = files.pop(file)
    with pytest.raises(UsageError, match=rf"dataset {PRESETS[name].repository} has changed on the Hugging Face hub: expected "):
        calibrate([Source(source=name)], talking, 1, 32)


@pytest.mark.parametrize(
    ("name", "evaluating", "others"),
    [
        ("fineweb-edu", False, "c4, slimpajama, dclm"), ("c4", True, "slimpajama"), ("ptb", True, "wikitext2"),
        ("ultrachat", False, "smoltalk"), ("hub:some/data", False, "wikitext2, ptb, c4, fineweb-edu, slimpajama, dclm, .*"),
        ("hub:togethercomputer/RedPajama-Data-1T-Sample", False, "fineweb-edu, slimpajama"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("code", ["unknown", "RepoNotFound"])
def test_a_dataset_that_the_hub_has_no_more(hub, talking, name, evaluating, others, code):
    repository = PRESETS[name].repository if name in PRESETS else name.removeprefix("hub:")
    if code != "unknown":
        hub.refusals[repository] = code
    expected = (
        rf"^dataset {repository} is not on the Hugging Face hub, or private \(then run: hf auth login\); use another: {others}$"
    )
    with pytest.raises(UsageError, match=expected):
        list(text_sources.documents(Source(source=name), evaluating, talking))


@pytest.mark.parametrize("name", ["c4", "ultrachat", "hub:some/data"])
def test_a_dataset_that_is_gated(hub, talking, name):
    repository = PRESETS[name].repository if name in PRESETS else "some/data"
    recorded = {"revision": "main", "files": ["data/train-0.parquet"], "columns": {"text": "string"}}
    hub.add(RECORDED.get(name, {"repository": repository, **recorded}))
    hub.refusals[repository] = "GatedRepo"
    page = f"https://huggingface.co/datasets/{repository}"
    expected = f"dataset {repository} is gated: accept its licence at {page}, then run: hf auth login"
    with pytest.raises(UsageError, match=f"^{expected}$"):
        list(text_sources.documents(Source(source=name), False, talking))


def test_a_dataset_by_its_name(hub, talking):
    hub.add({"repository": "some/data", "revision": "main", "files": ["data/train-0.parquet"], "columns": {"text": "string"}})
    assert len(list(text_sources.documents(Source(source="hub:some/data"), False, talking))) == ROWS


def test_a_name_whose_dataset_is_gone(tmp_path, tokenizer):
    item = Source(source="redpajama")
    expected = (
        r"togethercomputer/RedPajama-Data-1T-Sample is gone from the Hugging Face hub; use fineweb-edu or slimpajama, or `path:`"
    )
    with pytest.raises(UsageError, match=f"^source redpajama: {expected} with a local file"):
        text_sources.check(item, evaluating=False)
    with pytest.raises(UsageError, match="redpajama has no evaluation part"):
        text_sources.check(item, evaluating=True)
    (tmp_path / "a.jsonl").write_text('{"text": "some text", "meta": "{}"}\n', encoding="utf-8")
    item = Source(source="redpajama", path=str(tmp_path / "a.jsonl"))
    text_sources.check(item, evaluating=False)
    assert list(text_sources.documents(item, False, tokenizer)) == ["some text"]


def test_chats_of_a_preset(hub, tokenizer, tmp_path):
    hub.add(RECORDED["ultrachat"])
    with pytest.raises(UsageError, match="ultrachat: messages_key needs a chat template and the tokenizer has none"):
        calibrate([Source(source="ultrachat")], tokenizer, 2, 32)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    expected = "ultrachat: record 1, field `messages`: the tokenizer's chat template cannot render the messages: no such role"
    with pytest.raises(UsageError, match=expected):
        calibrate([Source(source="ultrachat")], tokenizer, 2, 32)
    tokenizer.chat_template = TEMPLATE
    rows = calibrate([Source(source="ultrachat")], tokenizer, 6, 32)
    first = "".join(said("ultrachat", FILES["ultrachat"][0], row) for row in range(ROWS))
    for row in rows.tolist():
        assert tokenizer.decode(row) in first, "windows come from the conversations as they follow each other"
