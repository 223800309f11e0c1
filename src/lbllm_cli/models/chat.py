"""Chat messages to text by a tokenizer's template, which is a program of strangers: bounded in time and memory."""

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lbllm_cli.core.errors import UsageError, reason

# Of one conversation. Templates take milliseconds and kilobytes.
SECONDS = 10
MEMORY = 256 << 20
CHARACTERS = 4 << 20


class _TooSlow(BaseException):
    """The time is over. Not an Exception: code of templates and libraries catches those."""


def render(tokenizer: Any, messages: Any, where: str, **options: Any) -> str:
    """Text of one conversation, with its special tokens written out: to be tokenized with add_special_tokens=False.

    messages: a list of mappings with `role` and `content`. where: what messages of errors name, such as a file and a record.
    options: for the tokenizer's apply_chat_template, such as add_generation_prompt.
    Raises UsageError when messages are none, and when the template fails, takes longer than SECONDS (in the main thread; other
    threads have no alarm), more than MEMORY or gives more than CHARACTERS.
    """
    _check(messages, where)
    try:
        with _deadline(), _memory():
            text = tokenizer.apply_chat_template(messages, **{**options, "tokenize": False})
    except _TooSlow:
        raise UsageError(f"{where}: the chat template was stopped after {SECONDS} s; mend chat_template") from None
    except MemoryError:
        raise UsageError(f"{where}: the chat template needs more than {MEMORY >> 20} MiB; mend chat_template") from None
    except Exception as error:  # a template is a program: it raises what it likes, RecursionError and TypeError among others
        what = f"{where}: the tokenizer's chat template cannot render the messages"
        # It may quote a record's half pairs, which no terminal and no file takes.
        said = reason(error).encode(errors="backslashreplace").decode()
        raise UsageError(f"{what}: {said}; mend them or chat_template") from None
    if len(text) > CHARACTERS:
        raise UsageError(
            f"{where}: the chat template makes {len(text):,} characters of one conversation; at most {CHARACTERS:,} are read"
        )
    return str(text)


def _check(messages: Any, where: str) -> None:
    """Templates print nothing for a field that is not there, and the characters of a text for a list of messages."""
    if not isinstance(messages, list | tuple) or not messages:
        # Not by comparison: an array compares its elements.
        found = "an empty list" if isinstance(messages, list) else type(messages).__name__
        raise UsageError(f"{where}: expected a list of messages with `role` and `content`, got {found}")
    for number, message in enumerate(messages, 1):
        what = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise UsageError(f"{what} is {type(message).__name__}, expected a mapping with `role` and `content`")
        if not isinstance(message.get("role"), str):
            have = ", ".join(map(str, message)) or "nothing"
            raise UsageError(f"{what} has no text as `role`, it has: {have[:200]}")
        content = message.get("content")
        parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not isinstance(content, str) and not parts and not (content is None and message.get("tool_calls")):
            raise UsageError(f"{what}: `content` is {type(content).__name__}, expected text")


@contextmanager
def _deadline() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TooSlow

    handler = signal.signal(signal.SIGALRM, stop)
    # Again every second: an exception is dropped where it arrives in a finalizer.
    timer = signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


@contextmanager
def _memory() -> Iterator[None]:
    """Allocations beyond MEMORY fail: `{{ 'a' * 10**11 }}` is one step of a template, which no clock interrupts."""
    statm = Path("/proc/self/statm")
    if not statm.exists():  # Linux alone limits the address space of a process that is running
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(statm.read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
