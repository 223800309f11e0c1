"""`lbllm chat`, of lines that are put in, and in a terminal."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from typer.testing import CliRunner

from lbllm_cli.cli import chat
from lbllm_cli.cli.app import app
from lbllm_cli.engine.location import library_path
from lbllm_cli.engine.model import Session

if library_path() is None:
    pytest.skip("this installation has no compiled kernels", allow_module_level=True)

TEMPLATE = (
    "{% for message in messages %}<|endoftext|>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant:{% endif %}"
)


@pytest.fixture
def folder(export_of, tmp_path):
    target = shutil.copytree(export_of("llama-tied"), tmp_path / "export")
    (target / "chat_template.jinja").write_text(TEMPLATE)
    return target


@pytest.fixture
def talk(folder):
    """talk(lines, options) -> the result."""

    def run(text: str, *options: str):
        command = ["chat", "--model", str(folder), "--max-new-tokens", "8", "--temperature", "0", *options]
        return CliRunner().invoke(app, command, input=text, catch_exceptions=False)

    return run


def test_each_line_is_answered(talk):
    result = talk("the sea\nthe sky\n")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 2
    assert result.stdout == talk("the sea\nthe sky\n").stdout
    assert "128 positions" in result.stderr


@pytest.fixture
def asked(monkeypatch):
    """Conversations that are rendered, each as pairs of role and content."""
    found, render = [], chat.templates.render

    def look(tokenizer, messages, *rest, **options):
        found.append([(message["role"], message["content"]) for message in messages])
        return render(tokenizer, messages, *rest, **options)

    monkeypatch.setattr(chat.templates, "render", look)
    return found


def test_a_conversation_goes_on_until_it_is_forgotten(talk, asked):
    talk("the sea\nthe sky\n/reset\nthe sea\n")
    assert [[role for role, _ in one] for one in asked] == [["user"], ["user", "assistant", "user"], ["user"]]
    asked.clear()
    talk("the sea\n/reset\nthe sky\n", "--system", "Be short.")
    assert [[role for role, _ in one] for one in asked] == [["system", "user"]] * 2


def test_what_was_said_is_not_computed_again(talk, monkeypatch):
    counts = []
    run = Session.run
    monkeypatch.setattr(Session, "run", lambda self, tokens: counts.append(len(tokens)) or run(self, tokens))
    talk("the sea\n")
    alone = counts[0]
    counts.clear()
    talk("the sea\nthe sky\n")
    second = [count for count in counts if count > 1][1]
    assert second < 2 * alone + 8


def test_commands(talk):
    result = talk("/help\n\n/exit\nthe sea\n")
    assert result.stdout == ""
    assert "there is no /help" in result.stderr


def test_the_oldest_messages_are_forgotten_where_there_is_no_room(talk):
    result = talk("the sea was calm and the sky was clear\n" * 9, "--system", "Be short.")
    assert result.exit_code == 0
    assert "the oldest message and its answer are forgotten" in result.stderr
    assert result.stderr.count("chat: the message has") == 0


def test_a_message_that_cannot_be_answered_costs_no_earlier_one(talk, asked):
    result = talk("the sea\nthe sky\n" + "the sea " * 200 + "\nonce\n")
    assert result.exit_code == 0
    assert "shorten it" in result.stderr
    assert "forgotten" not in result.stderr
    assert [content for role, content in asked[-1] if role == "user"] == ["the sea", "the sky", "once"]


def test_a_message_without_room_is_refused_and_the_conversation_goes_on(talk):
    result = talk("the sea " * 200 + "\nthe sea\n")
    assert result.exit_code == 0
    assert "shorten it" in result.stderr
    assert result.stdout == "\n" + talk("the sea\n").stdout


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_message_that_fills_the_last_position_is_refused(talk, folder, engine):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 3'))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    result = talk("xyz\na\n", "--engine", engine)
    assert result.exit_code == 0
    assert "the message has 3 tokens with all that goes before it, the model 3 positions; shorten it" in result.stderr
    assert result.stdout.startswith("\n")
    assert len(result.stdout) > 2


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_conversation_that_the_template_makes_nothing_of_is_refused(talk, folder, engine):
    (folder / "chat_template.jinja").write_text("{# nothing #}")
    result = talk("the sea\nthe sky\n", "--engine", engine)
    assert result.exit_code == 0
    assert result.stderr.count("chat: the conversation is empty, and the tokenizer has nothing that it begins with") == 2


def test_an_answer_that_is_stopped_leaves_the_program(talk, monkeypatch):
    run, calls = Session.run, []

    def stopped(self, tokens):
        calls.append(tokens)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, tokens)

    monkeypatch.setattr(Session, "run", stopped)
    result = talk("the sea\nthe sky\n")
    assert result.exit_code == 0
    first, second = result.stdout.split(" [stopped]\n")
    assert first
    assert second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json"),
    ],
)
def test_folders_that_it_cannot_talk_with(talk, folder, change, message):
    change(folder)
    result = talk("the sea\n")
    assert result.exit_code == 2
    assert message in result.stderr


def test_what_the_native_engine_does_not_do_is_done_by_transformers(talk, folder):
    first = talk("the sea\nthe sky\n")
    assert "native engine" in first.stderr
    other = talk("the sea\nthe sky\n", "--engine", "transformers", "--threads", "1")
    assert "transformers on cpu" in other.stderr
    assert other.stdout == first.stdout
    (folder / "generation_config.json").write_text('{"suppress_tokens": [3]}')
    assert "transformers on cpu" in talk("the sea\n").stderr
    result = talk("the sea\n", "--engine", "native")
    assert result.exit_code == 2
    assert "suppress_tokens; take --engine transformers" in result.stderr


def test_bad_options(talk):
    assert talk("x\n", "--temperature", "nan").exit_code == 2
    assert talk("x\n", "--max-new-tokens", "0").exit_code == 2
    result = talk("x\n", "--system", b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert result.exit_code == 2
    assert "--system is not UTF-8 text" in result.stderr


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="a terminal of Linux")
def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends(folder):
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "lbllm_cli", "chat", "--model", str(folder), "--max-new-tokens", "100", "--temperature", "0"]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        # A suite that runs in the background has it ignored, and so has all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(terminal)
    seen = b""

    def comes(text: bytes, seconds: float) -> bool:
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen and (left := end - time.monotonic()) > 0:
            if select.select([main], [], [], left)[0]:
                seen += os.read(main, 4096)
        return text in seen

    def resets() -> bool:
        os.write(main, b"\n/reset\n")
        return comes(b"forgotten", 5)

    def ends() -> bool:
        os.write(main, b"\x04")
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        return process.returncode is not None

    try:
        assert comes(b"> ", 60), seen
        os.write(main, b"the sea\n")
        assert comes(b"the sea\r\n", 60), seen
        process.send_signal(signal.SIGINT)
        seen = b""
        # What is typed while the signal is answered may go with the line that it ends; an end before there is a prompt is none.
        assert any(resets() for _ in range(12)), seen
        assert any(ends() for _ in range(12)), seen
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
