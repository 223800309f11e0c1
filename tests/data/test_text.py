"""The text that ships with the package."""

import re
from importlib.resources import files

import pytest

from lbllm_cli.data.sources import PARTS, STYLES, builtin_records, documents
from lbllm_cli.recipe.base import Source

CHARACTERS_PER_TOKEN = 4.5


@pytest.fixture(scope="module")
def records():
    """(part, style) -> its records."""
    return {(part, style): list(builtin_records(part, style)) for part in PARTS for style in STYLES}


def _tokens(records: list[dict[str, str]]) -> float:
    return sum(len(record["text"]) for record in records) / CHARACTERS_PER_TOKEN


def _paragraphs(records: list[dict[str, str]]) -> set[str]:
    """Paragraphs, without regard to whitespace; headings and other short lines may be common."""
    found = (" ".join(part.split()) for record in records for part in re.split(r"\n\s*\n", record["text"]))
    return {part for part in found if len(part) >= 40}


def test_every_style_of_every_part_holds_named_text(records):
    for key, found in records.items():
        assert len(found) >= 10, key
        for record in found:
            assert set(record) == {"document", "text"}
            assert record["text"].strip(), record["document"]
            assert "\r" not in record["text"]
            assert "\ufffd" not in record["text"]


def test_sizes(records):
    assert sum(_tokens(records["calibration", style]) for style in STYLES) >= 400_000
    for style in STYLES:
        assert _tokens(records["evaluation", style]) >= 40_000, style


def test_documents_have_one_place(records):
    names = [record["document"] for found in records.values() for record in found]
    assert len(set(names)) == len(names)
    projects = {part: {r["document"].split("/")[0] for style in STYLES for r in records[part, style]} for part in PARTS}
    assert projects["calibration"].isdisjoint(projects["evaluation"])


def test_no_paragraph_is_both_calibrated_and_evaluated_on(records):
    calibration = set().union(*(_paragraphs(records["calibration", style]) for style in STYLES))
    evaluation = set().union(*(_paragraphs(records["evaluation", style]) for style in STYLES))
    assert min(len(calibration), len(evaluation)) > 500
    assert calibration & evaluation == set()


def test_sources_by_name_give_the_text(records):
    for part, style in records:
        given = list(documents(Source(source=f"builtin:{part}/{style}"), part == "evaluation", None))
        assert given == [record["text"] for record in records[part, style]]


def test_the_notice_ships_and_names_every_project(records):
    notice = (files("lbllm_cli.data") / "text" / "NOTICE.md").read_text(encoding="utf-8")
    for (part, style), found in records.items():
        for project in {record["document"].split("/")[0] for record in found}:
            assert f"| {part} | {style} | {project} |" in notice
