"""Chat templates of strangers and messages of any kind: text, or one message that names where they are."""

import threading

import numpy as np
import pytest
from conftest import TOY
from transformers import AutoTokenizer

from lbllm_cli.core.errors import UsageError
from lbllm_cli.models import chat

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture
def render(monkeypatch):
    """render(template, messages): the text."""
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    monkeypatch.setattr(chat, "SECONDS", 60)

    def text(template=PLAIN, messages=USER, **options):
        tokenizer.chat_template = template
        return chat.render(tokenizer, messages, "a.jsonl, record 3", **options)

    return text


def test_messages_become_text(render):
    assert render() == "[user] hello\n"
    assert render(add_generation_prompt=True) == "[user] hello\n[assistant] "
    assert render(tokenize=True) == "[user] hello\n"
    answer = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert render("{% for m in messages %}{{ m.role }} {% endfor %}", [*USER, answer]) == "user assistant "
    assert render("{{ messages[0].content[0].text }}", [{"role": "user", "content": [{"type": "text", "text": "t"}]}]) == "t"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (None, "expected a list of messages with `role` and `content`, got NoneType"),
        ([], "got an empty list"),
        ("hello", "got str"),
        (7, "got int"),
        ({"role": "user", "content": "hello"}, "got dict"),
        (["hello"], "message 1 is str, expected a mapping"),
        ([None], "message 1 is NoneType"),
        ([[USER[0]]], "message 1 is list"),
        ([{}], "message 1 has no text as `role`, it has: nothing"),
        ([*USER, {"from": "gpt", "value": "hello"}], "message 2 has no text as `role`, it has: from, value"),
        ([{"role": None, "content": "hello"}], "message 1 has no text as `role`"),
        ([{"role": "user"}], "message 1: `content` is NoneType, expected text"),
        ([{"role": "user", "content": 5}], "`content` is int"),
        ([{"role": "user", "content": ["hello"]}], "`content` is list"),
        (np.array(USER), "got ndarray"),
        (np.array([]), "got ndarray"),
        ((), "got tuple"),
    ],
)
def test_messages_that_are_none(render, messages, expected):
    with pytest.raises(UsageError, match=f"a.jsonl, record 3: .*{expected}"):
        render(messages=messages)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "cannot render the messages: roles must alternate; mend"),
        ("{{ messages[7].content }}", "cannot render the messages: list object has no element 7"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'a' %}", "no loader"),
        ("(" * 5000 + "{{ " + "(" * 5000, "cannot render the messages: "),
        ({"tool_use": PLAIN}, "cannot render the messages: "),
    ],
)
def test_templates_that_fail(render, template, expected):
    with pytest.raises(UsageError, match="a.jsonl, record 3: .*" + expected) as caught:
        render(template)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_refusal_that_quotes_half_a_pair_can_be_printed(render):
    with pytest.raises(UsageError, match="cannot render the messages: no ") as caught:
        render("{{ raise_exception('no ' ~ messages[0].content) }}", [{"role": "user", "content": "\ud800"}])
    assert r"no \ud800; mend" in str(caught.value).encode().decode()


@pytest.mark.parametrize(
    "template",
    [
        "{% set x = 'ab' %}{{ x * 30000000000 }}",
        "{{ 'ab' * 3000000000 }}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'a'|center(30000000000) }}",
    ],
)
def test_templates_of_gigabytes(render, template):
    with pytest.raises(UsageError, match=r"a\.jsonl, record 3: the chat template needs more than 256 MiB"):
        render(template)


def test_long_text(render):
    with pytest.raises(UsageError, match=r"makes 5,000,001 characters of one conversation; at most 4,194,304 are read"):
        render("{{ 'a' * 5000000 }}b")


@pytest.mark.parametrize("body", ["", "{{ [i, j]|join }}"])
def test_templates_without_an_end(render, monkeypatch, body):
    monkeypatch.setattr(chat, "SECONDS", 1)
    loop = "{% for i in range(100000) %}{% for j in range(100000) %}" + body + "{% endfor %}{% endfor %}"
    with pytest.raises(UsageError, match=r"a\.jsonl, record 3: the chat template (was stopped after 1 s|needs more than)"):
        render(loop)  # to its end it would take hours
    assert render() == "[user] hello\n", "the alarm is off again"


def test_another_thread_renders_without_the_alarm(render):
    found = []
    thread = threading.Thread(target=lambda: found.append(render()))
    thread.start()
    thread.join()
    assert found == ["[user] hello\n"]
