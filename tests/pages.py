"""What tests of pages share: HTML whose elements are closed in order, and what is live in a text."""

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "source", "br", "link", "hr"}


class Checked(HTMLParser):
    """Every element closed in order; keeps elements and the text of the page."""

    def __init__(self, page: str):
        super().__init__()
        self.stack, self.elements, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), list(self.stack)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]


def live_html(markdown):
    """HTML that a renderer of Markdown hands on, beside that of folded parts."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    pieces = [token.content for token in tokens if token.type == "html_block"]
    pieces += [child.content for token in tokens for child in token.children or [] if child.type == "html_inline"]
    folded = r"</?(details|summary)>"
    return [piece for piece in pieces if re.search(r"<", re.sub(folded, "", piece))]
