"""Build the evaluation, calibration and training text that ships inside the package.

No project gives text to the evaluation part and another one, so that a score on it says nothing about a text that was
trained on; training takes pages that calibration left.  src/lbllm_cli/data/text/sources.toml lists projects, pages and
sizes.  On Debian 12:

    mkdir packages && cd packages
    apt-get download $(python ../scripts/build_text.py --list)
    for deb in *.deb; do dpkg -x "$deb" "${deb%%_*}"; done
    cd .. && python scripts/build_text.py --austen AUSTEN --packages packages

AUSTEN holds the four novels, a blank line between paragraphs.  The same inputs give the same bytes.  --count MODEL gives
the tokens of what ships, and how many runs of eight words of the evaluation part the other parts have, too.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from text_pages import EVALUATION, NOVELS, Paragraph, Source, read_pages

OUTPUT = Path(__file__).resolve().parent.parent / "src" / "lbllm_cli" / "data" / "text"
# In this order: what an earlier part holds, a later one leaves out.
PARTS = (EVALUATION, "calibration", "training")
TRAINING = PARTS[-1]
MOST_OF_ONE_PAGE = 24_000  # characters: so that no single page stands for its whole project
LEAST_OF_ONE_PAGE = 900  # shorter pages are stubs and lists of links
RUN = 8  # words: no paragraph of the training part has so many in a row that the evaluation part has, too

Document = tuple[str, str]  # name and text


@dataclass(frozen=True)
class Taken:
    """What earlier sources gave."""

    seen: dict[str, str] = field(default_factory=dict)  # paragraphs, without case and punctuation, and their part
    evaluated: set[str] = field(default_factory=set)  # runs of words


SOURCES = [Source(**entry) for entry in tomllib.loads((OUTPUT / "sources.toml").read_text())["source"]]


def runs(text: str) -> set[str]:
    """Every run of words, without case and punctuation."""
    words = re.findall(r"\w+", text.casefold())
    return {" ".join(words[at : at + RUN]) for at in range(len(words) - RUN + 1)}


def fresh(paragraphs: Iterable[Paragraph], source: Source, taken: Taken) -> list[str]:
    """Drop what was taken before, and headings with nothing under them; a novel may repeat itself ("Indeed!")."""
    kept: list[Paragraph] = []
    for heading, text in paragraphs:
        key = re.sub(r"\W+", "", text.casefold())
        if key in taken.seen and not (source.style == NOVELS and taken.seen[key] == source.part):
            continue
        taken.seen[key] = source.part
        if source.part != TRAINING or taken.evaluated.isdisjoint(runs(text)):
            kept.append((heading, text))
    under = [heading for heading, _ in kept[1:]] + [True]  # whether a heading follows, or nothing
    return [text for (heading, text), bare in zip(kept, under, strict=False) if not (heading and bare)]


def take(source: Source, folder: Path, taken: Taken) -> list[Document]:
    """Pages until the source's size is reached; a novel's chapters stay whole.

    Of a page that an earlier part took nothing is left, so that it is in one part alone.
    """
    documents: list[Document] = []
    for name, paragraphs in read_pages(source, folder):
        if sum(len(text) for _, text in documents) >= source.size:
            break
        texts = fresh(paragraphs, source, taken)
        ends = accumulate(len(text) + 2 for text in texts)
        most = source.size if source.style == NOVELS else MOST_OF_ONE_PAGE
        text = "\n\n".join(text for text, end in zip(texts, ends, strict=True) if end <= most)
        if len(text) >= LEAST_OF_ONE_PAGE:
            documents.append((f"{source.project}/{name}", text))
            if source.part == EVALUATION:
                taken.evaluated.update(runs(text))
    return documents


def write(path: Path, projects: dict[str, list[Document]]) -> None:
    """Write one file, its projects mixed in proportion from the first line on."""
    places = [(at / len(taken), name, at) for name, taken in projects.items() for at in range(len(taken))]
    documents = [projects[name][at] for _, name, at in sorted(places)]
    lines = [json.dumps({"document": name, "text": text}, ensure_ascii=False) for name, text in documents]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME))
    print(path.parent.name, path.name, sum(len(text) for _, text in documents), "characters")


def licence_text(source: Source, packages: Path) -> str:
    """The licence as the package's copyright file states it."""
    package = source.notice or source.package
    text = (packages / package / "usr/share/doc" / package / "copyright").read_text("utf-8")
    if source.licence == "PSF":
        start = text.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2")
        body = text[start : text.index("Licenses and Acknowledgements for Incorporated Software")]
    else:
        stanzas = re.findall(r"^License:[ \t]*(.+?)[ \t]*\n((?:[ \t].*\n)+)", text, re.MULTILINE)
        apache = source.licence.upper().startswith("APACHE-2")  # named there; its text is the package's own licence
        whole = "Apache-2.0" if apache else "DAMAGES"
        body = next(body for name, body in stanzas if name == source.licence and whole in body)
    return "\n".join("" if line.strip() == "." else line.strip() for line in body.splitlines()).strip()


def write_notice(sizes: dict[tuple[str, str], int], packages: Path) -> None:
    """The table of sources, and each licence once under the copyright lines it covers."""
    rows = ["# Sources of the text in this folder, and of the tasks that quote it (`../tasks`)\n"]
    rows.append("Made by `scripts/build_text.py`: paragraphs of prose; whitespace, quotes and dashes made plain.\n")
    rows.append("The Apache License 2.0 that some name is the package's own, in the file `LICENSE`.\n")
    head = "| Part | Style | Project | Debian 12 package | Version | Licence | Copyright | Characters |"
    rows.append(head + "\n" + "|---" * 8 + "|")
    licences: dict[str, tuple[str, list[str]]] = {}
    for s in SOURCES:
        fields = (s.part, s.style, s.project, s.package, s.version, s.licence, s.copyright)
        rows.append(f"| {' | '.join(fields)} | {sizes[s.part, s.project]} |")
        if s.licence != "public domain":
            body = licence_text(s, packages)
            # Packages wrap and mark the same licence differently.
            _, holders = licences.setdefault(re.sub(r"\W+", " ", body.casefold()), (body, []))
            if s.copyright not in holders:
                holders.append(s.copyright)
    for body, holders in licences.values():
        rows += ["\n---\n\n```text", *holders, "", body, "```"]
    (OUTPUT / "NOTICE.md").write_text("\n".join(rows) + "\n", "utf-8")


def build(austen: Path, packages: Path) -> None:
    """Read every source; write a file of each style of each part, and the notice."""
    taken = Taken()
    files: dict[Path, dict[str, list[Document]]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for source in sorted(SOURCES, key=lambda source: PARTS.index(source.part)):
        folder = austen if source.package == "-" else packages / source.package / "usr/share/doc"
        path = OUTPUT / source.part / f"{source.style}.jsonl.xz"
        documents = files.setdefault(path, {})[source.project] = take(source, folder, taken)
        sizes[source.part, source.project] = sum(len(text) for _, text in documents)
    for path, projects in files.items():
        write(path, projects)
    write_notice(sizes, packages)


def count(model: Path) -> None:
    """Print documents, characters and tokens of every file, and what each part shares with the evaluation part."""
    from tokenizers import Tokenizer  # what builds the text needs none of the package's dependencies

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    evaluated: set[str] = set()
    for part in PARTS:
        total, shared = 0, set()
        for path in sorted((OUTPUT / part).glob("*.jsonl.xz")):
            with lzma.open(path, "rt", encoding="utf-8") as lines:
                texts = [json.loads(line)["text"] for line in lines]
            tokens = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
            found = set().union(*map(runs, texts))
            evaluated |= found if part == EVALUATION else set()
            total, shared = total + tokens, shared | (found & evaluated)
            print(f"{part} {path.name}: {len(texts)} documents, {sum(map(len, texts))} characters, {tokens} tokens")
        print(f"{part}: {total} tokens, {len(shared)} of {len(evaluated)} runs of {RUN} words of {EVALUATION}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Build the text that ships inside the package.")
    parser.add_argument("--list", action="store_true", help="print the packages to fetch, with versions")
    parser.add_argument("--austen", type=Path, help="folder of four novels")
    parser.add_argument("--packages", type=Path, help="folder of unpacked Debian packages, one folder each")
    parser.add_argument("--count", type=Path, metavar="MODEL", help="folder of a tokenizer: count what ships")
    given = parser.parse_args()
    if given.count:
        count(given.count)
    elif given.list:
        pairs = ((name, s.version) for s in SOURCES for name in (s.package, s.notice) if name.strip("-"))
        print(*dict.fromkeys(map("=".join, pairs)))
    elif not given.austen or not given.packages:
        parser.error("give --austen and --packages, --list, or --count")
    else:
        build(given.austen, given.packages)


if __name__ == "__main__":
    main()
