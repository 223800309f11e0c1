"""A report as sections of tables, figures and notes, and its two forms: one HTML file that needs nothing else, and Markdown.

In running text `backticks` mark code. Everything else is taken literally: neither form lets text of a run become markup.
"""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lbllm_cli.core.markdown import code, literal, one_line
from lbllm_cli.pipeline.drawing import DARK, LIGHT, Image


@dataclass(frozen=True)
class Table:
    """columns: names of checkpoints or of values. rows: label and one cell per column. corner: what the labels are."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    corner: str = ""


@dataclass(frozen=True)
class Figure:
    """Images that belong together. caption: what to look for."""

    title: str
    images: list[Image]
    caption: str


@dataclass
class Section:
    """remarks: what the reader must know before trusting the rest. details: summary and preformatted text, folded."""

    title: str
    remarks: list[str] = field(default_factory=list)
    table: Table | None = None
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """facts: the head of the page, names and values."""

    title: str
    facts: list[tuple[str, str]]
    sections: list[Section]


def to_html(page: Page) -> str:
    """One HTML5 file without scripts or anything from outside."""
    loader = PackageLoader("lbllm_cli.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = lambda text: Markup(_prose(text, escape, lambda code: Markup("<code>{}</code>").format(code)))
    return environment.get_template("report.html.j2").render(page=page, light=LIGHT, dark=DARK)


def to_markdown(page: Page) -> str:
    """GitHub's Markdown, without the figures."""
    parts = [f"# {literal(page.title)}", "\n".join(f"- {literal(name)}: {literal(value)}" for name, value in page.facts)]
    for section in page.sections:
        parts.append(f"## {literal(section.title)}")
        parts += [f"> {_markdown_prose(remark)}" for remark in section.remarks]
        if section.table is not None:
            parts.append(_markdown_table(section.table))
        parts += [_markdown_prose(note) for note in section.notes]
        if section.figures:
            parts.append(f"In `report.html`: {'; '.join(literal(figure.title) for figure in section.figures)}.")
        for summary, text in section.details:
            # A fence longer than any in the text.
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            body = f"{fence}\n{text.rstrip()}\n{fence}"
            parts.append(f"<details>\n<summary>{html.escape(one_line(summary))}</summary>\n\n{body}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def _prose(text: str, plain: Callable[[str], str], code: Callable[[str], str]) -> str:
    """Text with its `code` told from the rest; a backtick without a partner is an ordinary character."""
    pieces = re.split("`([^`]+)`", text)
    return "".join(code(piece) if index % 2 else plain(piece) for index, piece in enumerate(pieces))


def _markdown_prose(text: str) -> str:
    return _prose(text, literal, code)


def _markdown_table(table: Table) -> str:
    lines = [[table.corner, *table.columns], ["---", *("---:" for _ in table.columns)]]
    lines[0] = [literal(cell) for cell in lines[0]]
    lines += [[literal(cell) for cell in (label, *cells)] for label, cells in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
