"""A page: text of a run is no markup of it."""

import re

import pytest
from pages import Checked, live_html

from lbllm_cli.report.page import Page, Section, Table, to_html, to_markdown


def test_text_of_a_run_is_not_markup():
    nasty = "a <b>bold</b> & `code` | _x_ [link](http://x)"
    table = Table([nasty], [(nasty, [nasty])])
    page = Page(nasty, [(nasty, nasty)], [Section(nasty, [nasty], table, [nasty], [], [(nasty, f"{nasty}\n````\n")])])
    text, markdown = to_html(page), to_markdown(page)
    assert not Checked(text).all("b")
    assert Checked(text).text.count("<b>bold</b>") >= 9
    outside = re.sub(r"(?s)`````\n.*?\n`````", "", markdown)
    assert outside != markdown
    assert "<b>" not in outside
    row = next(line for line in markdown.splitlines() if line.startswith("| a"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


NASTY = (
    "x\n\n<script>alert(1)</script>",
    "`x\n\n<script>alert(1)</script>`",
    "x`\n\n<script>alert(1)</script>",
    "``x\n\n<script>1</script>``",
    "a`b`\n\n<script>`\n\n<script>`",
    "x\n```\n\n<script>1</script>\n",
    "</summary></details>\n\n<script>",
    "a | b\n| <script>",
    "\u2028\u2028<script>\x85\x85<script>",
)


@pytest.mark.parametrize("nasty", NASTY)
def test_no_text_of_a_run_is_live_in_markdown(nasty):
    notes = [nasty, f"Not drawn: model.path {nasty} is not there; run `lbllm ptq --recipe {nasty}`"]
    table = Table([nasty, "b"], [(nasty, [nasty, nasty])], nasty)
    page = Page(nasty, [(nasty, nasty)], [Section(nasty, notes, table, notes, [], [(nasty, f"path: {nasty}\n")])])
    markdown = to_markdown(page)
    assert not live_html(markdown)
    assert not Checked(to_html(page)).all("script")
