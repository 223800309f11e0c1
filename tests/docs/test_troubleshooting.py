"""docs/troubleshooting.md quotes what lbllm says, word for word: recorded refusals, and texts of the source."""

import ast
import json
import re
from functools import cache

import pytest
from conftest import ASSETS, ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# What transformers says, in its own words.
QUOTED = [span for row in re.findall(r"^\| ([^|]*`[^|]*) \|", PAGE, flags=re.M) for span in re.findall(r"`([^`]+)`", row)]
QUOTED = [message for message in QUOTED if message != "weight"]


@cache
def recorded() -> list[str]:
    cases = json.loads((ASSETS / "refusals.json").read_text(encoding="utf-8")).values()
    return [" ".join(case["message"].removeprefix("lbllm: ").split()).replace("`", "") for case in cases]


def texts(tree: ast.AST) -> str:
    """All texts of a module, what is put into them as three dots."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found).replace("`", "")


@cache
def modules() -> list[str]:
    return [texts(ast.parse(path.read_text(encoding="utf-8"))) for path in (ROOT / "src" / "lbllm_cli").rglob("*.py")]


def said(message: str) -> bool:
    """Whether lbllm says it, `...` standing for anything."""
    pieces = [piece for piece in message.split("...") if piece.strip()]
    pattern = re.compile(".*".join(map(re.escape, message.split("..."))), flags=re.S)
    return any(pattern.fullmatch(text) for text in recorded()) or any(
        all(piece.strip() in module for piece in pieces) for module in modules()
    )


@pytest.mark.parametrize("message", QUOTED)
def test_message_is_one_of_lbllms(message):
    assert said(message)


def test_page_has_messages_and_others_are_told_apart():
    assert len(QUOTED) > 50
    assert not said("the ... checkpoint in ... is missing; run: ...")
    assert not said("out of memory")


def test_keys_that_may_change_in_the_middle_are_no_inputs():
    from lbllm_cli.recipe.stages import NOT_IN_FINGERPRINT

    (sentence,) = re.findall(r"its blocks would be of two kinds\.(.*?)may change in the middle", PAGE, flags=re.S)
    named = re.findall(r"`([\w.]+)`", sentence)
    assert named
    for key in named:
        assert any(known == key or known.endswith(f".{key}") for known in NOT_IN_FINGERPRINT), key
