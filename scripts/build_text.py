"""Build the calibration and evaluation text that ships inside the package.

No project gives text to both parts, so that a score on the evaluation part says nothing about a text that
calibration has seen; src/lbllm_cli/data/text/sources.toml lists projects, pages and sizes.  On Debian 12:

    mkdir packages && cd packages
    apt-get download $(python ../scripts/build_text.py --list)
    for deb in *.deb; do dpkg -x "$deb" "${deb%%_*}"; done
    cd .. && python scripts/build_text.py --austen AUSTEN --packages packages

AUSTEN holds the four novels, a blank line between paragraphs.  The same inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "src" / "lbllm_cli" / "data" / "text"
EVALUATION, NOVELS = "evaluation", "novels"
MOST_OF_ONE_PAGE = 24_000  # characters: so that no single page stands for its whole project
LEAST_OF_ONE_PAGE = 900  # shorter pages are stubs and lists of links
# Lost formulas, addresses, and coarse language, which a test text can do without.
UNWANTED = re.compile(r"\0|\w@\w|://|\b(fuck|shit|porn|pedo|rape\b)", re.IGNORECASE)
PLAIN = str.maketrans("‘’‚′“”„″«»‐‑–−", "'" * 4 + '"' * 6 + "-" * 4, "\u00ad\u200b\ufeff¶")
PLAIN |= {ord("—"): "--", ord("…"): "..."}

Paragraph = tuple[bool, str]  # whether it is a heading, and its text
Document = tuple[str, str]  # name and text


@dataclass(frozen=True, kw_only=True)
class Source:
    """One project's share of one style; sources.toml describes the fields."""

    part: str
    style: str
    project: str
    package: str = "-"
    version: str = "-"
    licence: str
    copyright: str
    pages: list[str]
    size: int
    skip: str = r"(^|/)(index|genindex|search|changelog|toc)\."
    notice: str = ""
    tables: bool = False
    encoding: str = "utf-8"


SOURCES = [Source(**entry) for entry in tomllib.loads((OUTPUT / "sources.toml").read_text())["source"]]


def tidy(text: str) -> str:
    """One line of plain text: ASCII quotes and dashes, single spaces, none before punctuation."""
    text = re.sub(r"\s+", " ", text.translate(PLAIN)).strip()
    return re.sub(r"(?<=\() | (?=\))| (?=[,.;:!?](\s|$))", "", text)


class Page(HTMLParser):
    """Collect the paragraphs of a page's main part, without navigation, code, tables and signatures."""

    BLOCK = re.compile(r"p|li|h[1-6]|div|section|article|blockquote|d[tdl]|[uo]l|hr|t[dr]")
    CODE = re.compile(r"script|style|head|nav|header|footer|pre|form|button|select|svg|math|aside|dt")
    # Class names that the documentation tools give to what is not prose.
    NOISE = re.compile(
        r"(^|[ _-])(headerlink|sphinxsidebar|related|navheader|navfooter|toc\w*|contents|footer|highlight"
        r"|menu|nosearch|math|sig|api_metadata|srclink|version(modified|added|changed)|deprecated|field-list"
        r"|navigation|sidebar|screen|programlisting|synopsis|mark|topic|footnote|citation|imgcontainer"
        r"|codeblock|fancy_toc)($|[ _-])"
    )
    # These are kept whatever their class: the page itself, and what is inline or has no end to wait for.
    KEPT = re.compile(r"html|body|br|img|hr|p|code")

    def __init__(self, keep_tables: bool) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[Paragraph] = []
        self.pieces: list[str] = []
        self.heading = False
        self.dropped: list[str] = []  # the element being dropped, and those of its name inside it
        self.keep_tables = keep_tables

    def flush(self) -> None:
        """End the paragraph under way."""
        if text := tidy("".join(self.pieces)):
            self.found.append((self.heading, text))
        self.pieces.clear()
        self.heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.dropped:
            self.dropped += [tag] * (tag == self.dropped[0])
            return
        values = {name: value or "" for name, value in attrs}
        unwanted = bool(self.CODE.fullmatch(tag)) or (tag == "table" and not self.keep_tables)
        if unwanted or self.BLOCK.fullmatch(tag):
            self.flush()
            self.heading = bool(re.fullmatch(r"h\d", tag))
        elif tag in ("br", "img", "span"):  # a sentence that loses a formula is marked, to be dropped
            self.pieces.append("\0" if "math" in values.get("class", "") else " " * (tag != "span"))
        if tag == "main" or values.get("role") == "main" or values.get("id") == "apicontent":
            self.found.clear()  # whatever came before the main part was navigation
        elif unwanted or (not self.KEPT.fullmatch(tag) and self.NOISE.search(values.get("class", ""))):
            self.dropped = [tag]

    def handle_endtag(self, tag: str) -> None:
        if self.dropped:
            del self.dropped[: tag == self.dropped[0]]
        elif self.BLOCK.fullmatch(tag):
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self.dropped:
            self.pieces.append(data)


def is_prose(text: str) -> bool:
    """Whether a paragraph reads as running English rather than as code, a signature or a list of links."""
    words = text.split()
    if not 7 <= len(words) <= 700 or UNWANTED.search(text):
        return False
    # A short line that ends in a colon announced code or a table, which is gone.
    if not re.search(r"[.!?:;][\"')\]]*$", text) or (text.endswith(":") and len(text) < 120):
        return False
    if sum(c.isascii() and (c.isalpha() or c in " ,.'") for c in text) < 0.88 * len(text):
        return False
    odd = sum(bool(re.search(r"[_=<>{}\\|/$%^~*@\[\]]|::|\(\)|[a-z][A-Z]|\d{3}", word)) for word in words)
    return odd <= 0.14 * len(words)


def html_paragraphs(path: Path, source: Source) -> list[Paragraph]:
    """The prose of one page, and headings that are words, without their numbers."""
    page = Page(source.tables)
    page.feed(path.read_text(source.encoding))
    page.flush()
    number = re.compile(r"^((Chapter|Appendix) )?[A-Z]?\d+(\.\d+)*\.?\s+")
    words = re.compile(r"[A-Za-z][A-Za-z ,'?-]{2,89}")
    found = [(heading, number.sub("", text).strip(" #") if heading else text) for heading, text in page.found]
    return [pair for pair in found if (words.fullmatch(pair[1]) if pair[0] else is_prose(pair[1]))]


def info_documents(path: Path) -> Iterator[tuple[str, list[Paragraph]]]:
    """The nodes of the Jargon File: dictionary entries and essays."""
    text = gzip.decompress(path.read_bytes()).decode("latin-1")
    for name, body in re.findall(r"\x1f\s*File: [^,]*,\s+Node: ([^,]+),.*\n([^\x1f]*)", text):
        body = body.partition("* Menu:")[0]
        body = re.sub(r"[{}]|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)", "", body)  # cross references and emphasis
        body = re.sub(r"^:([^:\n]+):(\s*/[^/\n]+/)*\s*", r"\1: ", body, flags=re.MULTILINE)  # pronunciations
        body = re.sub(r"/[a-z., ]+\./\s*", "", body)  # word classes
        body = body.replace("``", '"').replace("''", '"').replace("`", "'")
        found = [tidy(paragraph) for paragraph in re.split(r"\n\s*\n", body)]
        yield re.sub(r"\W+", "_", name).strip("_"), [(False, text) for text in found if is_prose(text)]


def novel_documents(path: Path) -> Iterator[tuple[str, list[Paragraph]]]:
    """The chapters of a novel, without the title page, volume and chapter lines, and emphasis."""
    flags = re.IGNORECASE | re.MULTILINE
    text = re.sub(r"^(volume [ivx]+|finis|the end)\.?[ \t]*$", "", path.read_text("utf-8"), flags=flags)
    chapters = re.split(r"^chapter [ivxlc\d]+\.?[ \t]*$", text, flags=flags)[1:]
    for number, chapter in enumerate(chapters, 1):
        found = [tidy(re.sub(r"_([^_]+)_", r"\1", paragraph)) for paragraph in re.split(r"\n\s*\n", chapter)]
        yield f"chapter_{number:02d}", [(False, text) for text in found if text]


def fresh(paragraphs: Iterable[Paragraph], source: Source, seen: dict[str, str]) -> list[str]:
    """Drop what `seen` has, and headings with nothing under them; a novel may repeat itself ("Indeed!")."""
    kept: list[Paragraph] = []
    for heading, text in paragraphs:
        key = re.sub(r"\W+", "", text.casefold())
        if key in seen and not (source.style == NOVELS and seen[key] == source.part):
            continue
        seen[key] = source.part
        kept.append((heading, text))
    under = [heading for heading, _ in kept[1:]] + [True]  # whether a heading follows, or nothing
    return [text for (heading, text), bare in zip(kept, under, strict=False) if not (heading and bare)]


def read_pages(source: Source, folder: Path) -> Iterator[tuple[str, list[Paragraph]]]:
    """The pages of a source; in a fixed order without pattern, so that a share is spread over its project."""
    files: dict[str, Path] = {}
    for path in (path for glob in source.pages for path in folder.glob(glob)):
        if not re.search(source.skip, name := path.relative_to(folder).as_posix()):
            files[name.partition("/")[2].removeprefix("html/").rpartition(".")[0] or name] = path
    if not files:
        raise SystemExit(f"{source.project}: no pages under {folder}")
    one_file = {NOVELS: novel_documents, "jargon": info_documents}
    reader = one_file.get(source.style) or one_file.get(source.project)
    several = dict(reader(folder / source.pages[0])) if reader else {}
    names = sorted(several or files, key=lambda name: hashlib.sha256(name.encode()).digest())
    if source.style == NOVELS and source.part == EVALUATION:
        names.sort()  # read from its beginning
    for name in names:
        yield name, several[name] if several else html_paragraphs(files[name], source)


def take(source: Source, folder: Path, seen: dict[str, str]) -> list[Document]:
    """Pages until the source's size is reached; a novel's chapters stay whole."""
    taken: list[Document] = []
    for name, paragraphs in read_pages(source, folder):
        if sum(len(text) for _, text in taken) >= source.size:
            break
        texts = fresh(paragraphs, source, seen)
        ends = accumulate(len(text) + 2 for text in texts)
        most = source.size if source.style == NOVELS else MOST_OF_ONE_PAGE
        text = "\n\n".join(text for text, end in zip(texts, ends, strict=True) if end <= most)
        if len(text) >= LEAST_OF_ONE_PAGE:
            taken.append((f"{source.project}/{name}", text))
    return taken


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
        body = next(body for name, body in stanzas if name == source.licence and "DAMAGES" in body)
    return "\n".join("" if line.strip() == "." else line.strip() for line in body.splitlines()).strip()


def write_notice(projects: dict[str, list[Document]], packages: Path) -> None:
    """The table of sources, and each licence once under the copyright lines it covers."""
    rows = ["# Sources of the text in this folder, and of the tasks that quote it (`../tasks`)\n"]
    rows.append("Made by `scripts/build_text.py`: paragraphs of prose; whitespace, quotes and dashes made plain.\n")
    head = "| Part | Style | Project | Debian 12 package | Version | Licence | Copyright | Characters |"
    rows.append(head + "\n" + "|---" * 8 + "|")
    licences: dict[str, tuple[str, list[str]]] = {}
    for s in SOURCES:
        fields = (s.part, s.style, s.project, s.package, s.version, s.licence, s.copyright)
        rows.append(f"| {' | '.join(fields)} | {sum(len(text) for _, text in projects[s.project])} |")
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
    """Read every source; write the six files and the notice."""
    seen: dict[str, str] = {}
    files: dict[Path, dict[str, list[Document]]] = {}
    # Evaluation comes first: a paragraph found in both parts stays there and leaves calibration.
    for source in sorted(SOURCES, key=lambda source: source.part != EVALUATION):
        folder = austen if source.style == NOVELS else packages / source.package / "usr/share/doc"
        path = OUTPUT / source.part / f"{source.style}.jsonl.xz"
        files.setdefault(path, {})[source.project] = take(source, folder, seen)
    for path, projects in files.items():
        write(path, projects)
    write_notice({name: taken for projects in files.values() for name, taken in projects.items()}, packages)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Build the text that ships inside the package.")
    parser.add_argument("--list", action="store_true", help="print the packages to fetch, with versions")
    parser.add_argument("--austen", type=Path, help="folder of the four novels")
    parser.add_argument("--packages", type=Path, help="folder of unpacked Debian packages, one folder each")
    given = parser.parse_args()
    if given.list:
        pairs = ((name, s.version) for s in SOURCES for name in (s.package, s.notice) if name.strip("-"))
        print(*dict.fromkeys(map("=".join, pairs)))
    elif not given.austen or not given.packages:
        parser.error("give --austen and --packages, or --list")
    else:
        build(given.austen, given.packages)


if __name__ == "__main__":
    main()
