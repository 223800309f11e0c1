"""Reading the bundled text's sources for build_text.py: pages of documentation, the Jargon File and novels, as prose."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

EVALUATION, NOVELS = "evaluation", "novels"
# Lost formulas, addresses, and coarse language, which a test text can do without.
UNWANTED = re.compile(r"\0|\w@\w|://|\b(fuck|shit|porn|pedo|rape\b|nigger)", re.IGNORECASE)
PLAIN = str.maketrans("‘’‚′“”„″«»‐‑–−", "'" * 4 + '"' * 6 + "-" * 4, "\u00ad\u200b\ufeff¶")
PLAIN |= {ord("—"): "--", ord("…"): "..."}

Paragraph = tuple[bool, str]  # whether it is a heading, and its text


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
    opening: str = ""


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


def r_texts(path: Path) -> Iterator[str]:
    """The texts in the data of an R package: vectors of lines, each packed by itself behind its size."""
    data = path.read_bytes()
    while data:
        unpacking = zlib.decompressobj()
        packed, data = unpacking.decompress(data[4:]), unpacking.unused_data
        # Behind two letters, three numbers and the encoding's name: the vector's kind and length; of each line the same.
        at = 18 + int.from_bytes(packed[14:18])
        lines = []
        count, at = int.from_bytes(packed[at + 4 : at + 8]), at + 8
        for _ in range(count):
            end = at + 8 + int.from_bytes(packed[at + 4 : at + 8])
            lines.append(packed[at + 8 : end].decode())
            at = end
        yield "\n".join(lines).removeprefix("\ufeff").replace("\r\n", "\n")


def novel_documents(path: Path, source: Source) -> Iterator[tuple[str, list[Paragraph]]]:
    """The chapters of a novel, without the title page, volume and chapter lines, emphasis, and what follows its end."""
    flags = re.IGNORECASE | re.MULTILINE
    books = r_texts(path) if path.suffix == ".rdb" else [path.read_text("utf-8")]
    text = next(book for book in books if book.startswith(source.opening))
    text = re.split(r"^(?:end of (?:the )?project gutenberg|a note on the text$)", text, flags=flags)[0]
    text = re.sub(r"^(volume [ivx]+|finis|the end)\.?[ \t]*$", "", text, flags=flags)
    chapters = re.split(r"^chapter [ivxlc\d]+\.?(?: [^\n]*)?[ \t]*$", text, flags=flags)[1:]
    for number, chapter in enumerate(chapters, 1):
        found = [tidy(re.sub(r"_([^_]+)_", r"\1", paragraph)) for paragraph in re.split(r"\n\s*\n", chapter)]
        yield f"chapter_{number:02d}", [(False, text) for text in found if text and not UNWANTED.search(text)]


def read_pages(source: Source, folder: Path) -> Iterator[tuple[str, list[Paragraph]]]:
    """The pages of a source; in a fixed order without pattern, so that a share is spread over its project."""
    files: dict[str, Path] = {}
    for path in (path for glob in source.pages for path in folder.glob(glob)):
        if not re.search(source.skip, name := path.relative_to(folder).as_posix()):
            files[name.partition("/")[2].removeprefix("html/").rpartition(".")[0] or name] = path
    if not files:
        raise SystemExit(f"{source.project}: no pages under {folder}")
    several: dict[str, list[Paragraph]] = {}
    if source.style == NOVELS:
        several = dict(novel_documents(folder / source.pages[0], source))
    elif source.project == "jargon":
        several = dict(info_documents(folder / source.pages[0]))
    names = sorted(several or files, key=lambda name: hashlib.sha256(name.encode()).digest())
    if source.style == NOVELS and source.part == EVALUATION:
        names.sort()  # read from its beginning
    for name in names:
        yield name, several[name] if several else html_paragraphs(files[name], source)
