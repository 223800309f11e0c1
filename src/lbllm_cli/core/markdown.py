"""Text of users in Markdown: nothing in it becomes markup."""

import html
import re


def one_line(text: str) -> str:
    """Text without line breaks, tabs and runs of blanks: a blank line would end whatever the text stands in."""
    return re.sub(r"\s+", " ", text)


def literal(text: str) -> str:
    """Text in which no character means anything to Markdown or HTML, on one line."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(one_line(text), quote=False))


def code(text: str) -> str:
    """Text without backticks as inline code, on one line; a pipe would still end the cell of a table."""
    return f"`{one_line(text)}`"
