"""The lm-eval tasks that ship with the package."""

import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise

import pytest
import yaml
from conftest import ROOT
from jinja2 import Template

from lbllm_cli.data.sources import PARTS, STYLES, builtin_records

SCRIPT = ROOT / "scripts" / "build_tasks.py"
TASKS = files("lbllm_cli.data") / "tasks"
NAMES = ("continuation", "last_word")
RUN = 12  # words in a row that no two texts have by accident


@pytest.fixture(scope="module")
def script():
    """scripts/build_tasks.py as a module."""
    spec = importlib.util.spec_from_file_location("build_tasks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts():
    """(part, style) -> document -> its text, in one line."""
    found = {(part, style): builtin_records(part, style) for part in PARTS for style in STYLES}
    return {key: {r["document"]: " ".join(r["text"].split()) for r in records} for key, records in found.items()}


@pytest.fixture(scope="module")
def items():
    """Task -> its items."""
    lines = {name: (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in (*NAMES, "retrieval")}
    return {name: [json.loads(line) for line in found] for name, found in lines.items()}


def _answer(item: dict) -> str:
    return item["word"] if "word" in item else item["choices"][item["gold"]]


def _source(texts: dict, item: dict) -> str:
    return texts["evaluation", item["style"]][item["document"]]


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[at:] for at in range(RUN)), strict=False)


def test_the_script_makes_what_ships(script):
    built = script.build()
    shipped = {path.name: path.read_bytes() for path in TASKS.iterdir() if path.name.endswith(".jsonl")}
    assert {name: text.encode() for name, text in built.items()} == shipped
    assert all(len(data) < 500_000 for data in shipped.values())


@pytest.mark.parametrize("name", NAMES)
def test_styles_have_equal_shares_of_any_beginning(name, items):
    assert 300 <= len(items[name]) <= 400
    assert [item["style"] for item in items[name]] == [*STYLES] * (len(items[name]) // len(STYLES))


@pytest.mark.parametrize("name", NAMES)
def test_answers_follow_their_contexts(name, items, texts):
    for item in items[name]:
        _, found, rest = _source(texts, item).partition(f"{item['context']} {_answer(item)}")
        assert found, item
        assert not re.match(r"\w", rest), item


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_in_two_items(name, items, texts):
    taken: dict[str, list[tuple[int, int]]] = {}
    for item in items[name]:
        passage = f"{item['context']} {_answer(item)}"
        assert _source(texts, item).count(passage) == 1
        start = _source(texts, item).index(passage)
        taken.setdefault(item["document"], []).append((start, start + len(passage)))
    for spans in map(sorted, taken.values()):
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize("name", NAMES)
def test_contexts_are_clean_prose(name, items, script):
    for item in items[name]:
        context = item["context"]
        assert script.LEAST <= len(context.split()) <= script.MOST
        assert re.match(r"[\"'(]?[A-Z]", context)
        assert context == " ".join(context.split())
        assert not re.search(r"[{}<>=|\\]|::|\bChapter [IVX\d]", context), context


def test_options_are_alike_and_from_one_document(items, texts):
    for item in items["continuation"]:
        true, lengths = len(_answer(item)), [len(choice) for choice in item["choices"]]
        assert len(set(item["choices"])) == 4
        for choice in item["choices"]:
            assert choice in _source(texts, item)
            assert choice not in item["context"]
            assert re.fullmatch(r"[A-Z'].*[.!?]'?", choice), choice
        assert min(lengths) >= 0.75 * true
        assert max(lengths) <= 1.25 * true


def test_positions_of_the_true_continuation_tell_nothing(items):
    for style in STYLES:
        gold = [item["gold"] for item in items["continuation"] if item["style"] == style]
        assert Counter(gold) == dict.fromkeys(range(4), len(gold) // 4)
        following = {(gold[at + 1] - gold[at]) % 4 for at in range(len(gold) - 1)}
        assert following == {0, 1, 2, 3}  # no cycle


def test_last_words_recur_and_belong_to_a_subject(items):
    for item in items["last_word"]:
        assert re.fullmatch(r"[A-Za-z][a-z]{3,}", item["word"])
        assert re.search(rf"\b{item['word']}\b", item["context"])
        assert item["word"].lower() not in {"them", "that", "this", "there", "here", "with", "been", "have", "more", "time"}


def test_a_passage_names_one_number_and_asks_for_it(items, texts, script):
    found = items["retrieval"]
    assert [(item["style"], item["words"]) for item in found[:9]] == [(style, n) for n in script.LENGTHS for style in STYLES]
    assert Counter((item["style"], item["words"]) for item in found) == dict.fromkeys(
        [(style, words) for style in STYLES for words in script.LENGTHS], script.PASSAGES
    )
    depths = []
    for item in found:
        named = re.search(r"The number of the \w+ \w+ is$", item["context"])[0]
        before, after = item["context"].removesuffix(named).split(f"{named} {item['number']}.")
        depths.append(len(before) / len(before + after))
        assert re.fullmatch(r"[1-9]\d{4}", item["number"])
        assert not re.search(r"\d", before + after), "another figure could be meant"
        assert item["words"] <= len((before + after).split()) < item["words"] + 100
        source = _source(texts, item)
        assert all(sentence.text in source for sentence in script.sentences(before + after) if sentence.words > 3)
    # As many answers near the end of a passage as near its beginning.
    assert 0.4 < sum(depths) / len(depths) < 0.6
    assert [sum(low <= depth < low + 0.25 for depth in depths) > 15 for low in (0, 0.25, 0.5, 0.75)] == [True] * 4


def test_no_context_is_calibrated_or_trained_on(items, texts):
    contexts = {run for found in items.values() for item in found for run in _runs(item["context"])}
    assert len(contexts) > 10_000
    for (part, _), found in texts.items():
        if part != "evaluation":
            for name, text in found.items():
                assert contexts.isdisjoint(_runs(text)), name


@pytest.mark.parametrize("name", [*NAMES, "retrieval"])
def test_definitions_fit_the_items(name, items):
    text = (TASKS / f"{name}.yaml").read_text(encoding="utf-8")
    task = yaml.safe_load(text)
    assert task["task"] == f"lbllm_{name}"
    assert task["dataset_kwargs"] == {"data_files": {"test": f"{name}.jsonl"}}
    item = items[name][0]
    assert Template(task["doc_to_text"]).render(item) == item["context"]
    if name == "continuation":
        assert Template(task["doc_to_choice"]).render(item) == str(item["choices"])
        assert Template(task["doc_to_target"]).render(item) == str(item["gold"])
    else:
        assert Template(task["doc_to_target"]).render(item) == f" {item['word' if name == 'last_word' else 'number']}"
