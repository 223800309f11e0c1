"""How the bundled text is chosen and read: what earlier parts took, novels, the data of R packages."""

import sys
import zlib
from importlib import import_module

import pytest
from conftest import ROOT


@pytest.fixture
def build(monkeypatch):
    """scripts/build_text.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    yield import_module("build_text")
    for name in ("build_text", "text_pages"):
        sys.modules.pop(name, None)


@pytest.fixture
def source(build):
    """A source of these pages, with fields to be replaced."""

    def made(**fields):
        given = {"part": "training", "style": "technical", "project": "toys", "licence": "", "copyright": "", "size": 10**6}
        return build.Source(**given | fields)

    return made


def _sentences(name: str) -> list[str]:
    """Paragraphs without eight words in a row that a page of another name has."""
    return [f"A {name} turns {name} {'i' * n} times until the {name} of all {name}s glows and rests." for n in range(1, 20)]


def test_training_takes_pages_and_paragraphs_that_nothing_else_has(build, source, tmp_path):
    for name in ("wheel", "lever", "crank"):
        found = _sentences(name)
        if name == "crank":
            found += ["Here, A WHEEL turns 'wheel i' times until the crank stops.", _sentences("lever")[0]]
        (tmp_path / f"{name}.html").write_text("".join(f"<p>{text}</p>" for text in found))
    taken = build.Taken()
    evaluated = build.take(source(part="evaluation", pages=["wheel.html"]), tmp_path, taken)
    calibrated = build.take(source(part="calibration", pages=["lever.html"]), tmp_path, taken)
    trained = build.take(source(pages=["lever.html", "crank.html"]), tmp_path, taken)
    assert [name for name, _ in evaluated + calibrated + trained] == ["toys/wheel.html", "toys/lever.html", "toys/crank.html"]
    assert trained[0][1].split("\n\n") == _sentences("crank")


def test_a_novel_is_its_chapters(build, source, tmp_path):
    text = (
        "THE WHALE\n\nCHAPTER 1. Loomings.\n\nCall me _Ishmael_.\n\nSee mail@example.\n\n"
        "CHAPTER 2\n\nI stuffed\na shirt.\n\nFINIS\n\nEnd of Project Gutenberg's Whale\n\nLicence"
    )
    (tmp_path / "whale.txt").write_text(text)
    found = dict(build.read_pages(source(style="novels", pages=["whale.txt"]), tmp_path))
    assert found == {"chapter_01": [(False, "Call me Ishmael.")], "chapter_02": [(False, "I stuffed a shirt.")]}


def test_a_novel_is_found_in_the_data_of_an_r_package(build, source, tmp_path):
    def number(value):
        return value.to_bytes(4)

    def packed(lines):
        held = b"".join(number(9) + number(len(line.encode())) + line.encode() for line in lines)
        body = b"X\n" + number(3) + number(0) + number(0) + number(5) + b"UTF-8" + number(16) + number(len(lines)) + held
        return number(len(body)) + zlib.compress(body)

    books = ["EMMA", "CHAPTER I", "", "She was clever."], ["\ufeffNORTHANGER", "Chapter 1", "", "No “one” would.\r\nWho?"]
    (tmp_path / "data.rdb").write_bytes(b"".join(map(packed, books)))
    novel = source(style="novels", pages=["data.rdb"], opening="NORTHANGER")
    assert dict(build.read_pages(novel, tmp_path)) == {"chapter_01": [(False, 'No "one" would. Who?')]}
