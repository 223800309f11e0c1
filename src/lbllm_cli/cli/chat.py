"""`lbllm chat`: a conversation in a terminal, or of the lines of a pipe."""

import io
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lbllm_cli.cli.generate import speed
from lbllm_cli.cli.native import Native, open_native
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.model_folder import resolve
from lbllm_cli.engine.config import Unfit
from lbllm_cli.engine.model import Sampler, Session
from lbllm_cli.engine.text import Decoder, new_tokens
from lbllm_cli.models import chat as templates
from lbllm_cli.models.prompts import check_tokens, tokens_of

Message = dict[str, str]
_HELP = "Ctrl-C stops an answer, /reset forgets the conversation, Ctrl-D or /exit ends."


@dataclass
class Conversation:
    """Messages, and the session that has read them."""

    native: Native
    sampler: Sampler
    most: int
    messages: list[Message]
    session: Session = field(init=False)

    def __post_init__(self) -> None:
        self.session = Session(self.native.model)

    def ask(self, text: str) -> Iterator[str]:
        """Appends a message and its answer, which comes piece by piece; an answer that is broken off counts as far as it came.

        The oldest messages are forgotten where the model has no positions for all. Raises UsageError for one that alone has not
        room enough, which is not appended.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._fitting()
        except UsageError:
            self.messages.pop()
            raise
        count = min(self.most, self.native.limit - len(prompt))
        decoder, said, times = Decoder(self.native.tokenizer), "", [time.perf_counter()]
        try:
            for token in new_tokens(self.session, prompt, self.sampler, count, self.native.ends):
                times.append(time.perf_counter())
                piece = decoder.add(token)
                said += piece
                yield piece
            rest = decoder.rest()
            said += rest
            yield rest
        finally:
            self.messages.append({"role": "assistant", "content": said})
        yield f"\n[{speed(times, len(prompt))}]" if sys.stderr.isatty() and len(times) > 1 else ""

    def _fitting(self) -> list[int]:
        """Tokens of the conversation, its oldest messages left out until there is room for an answer."""
        room = min(self.most, self.native.limit // 4)
        while True:
            prompt = self._tokens()
            if len(prompt) + room <= self.native.limit:
                return prompt
            first = 1 if self.messages[0]["role"] == "system" else 0
            if len(self.messages) - first < 3:
                raise UsageError(
                    f"the message has {len(prompt)} tokens with all that goes before it, the model {self.native.limit} "
                    "positions; shorten it"
                )
            del self.messages[first : first + 2]
            say("chat: the oldest message and its answer are forgotten, the model has no more positions")

    def _tokens(self) -> list[int]:
        text = templates.render(self.native.tokenizer, self.messages, "the conversation", add_generation_prompt=True)
        tokens = tokens_of(self.native.tokenizer, text, "the conversation", add_special_tokens=False)
        check_tokens(tokens, self.native.model.config.vocab_size, "the conversation")
        return tokens


@dataclass(frozen=True)
class Wishes:
    """What the options say. max_new_tokens: of an answer, at most."""

    system: str | None
    temperature: float
    seed: int
    max_new_tokens: int
    threads: int | None


def chat(model: str, wishes: Wishes) -> None:
    """Talks until the end of the input. model: a packed export, or the id of one."""
    if math.isnan(wishes.temperature):
        raise UsageError("--temperature nan: expected a number from 0 to 2")
    folder = resolve(model, None, weights=True, key="--model")
    try:
        native = open_native(folder, "cpu", wishes.temperature, wishes.threads)
    except Unfit as error:
        raise UsageError(
            f"lbllm chat cannot run {folder}: {error}; see `lbllm generate` and `lbllm serve`, which run any model"
        ) from None
    if not native.tokenizer.chat_template:
        raise UsageError(f"{folder} has no chat template, it is not made for conversations; see `lbllm generate --raw`")
    sampler = Sampler(native.model.lib, native.sampling, wishes.seed)
    start = [{"role": "system", "content": _text(wishes.system, "--system")}] if wishes.system else []
    talk = Conversation(native, sampler, wishes.max_new_tokens, list(start))
    say(f"chat: {folder}, {native.limit} positions, {native.model.threads} threads. {_HELP}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with _interruptible():
        for line in _lines():
            if line == "/exit":
                break
            if line == "/reset":
                talk.messages[:] = start
                say("chat: forgotten")
            elif line.startswith("/"):
                say(f"chat: there is no {line.split()[0]}. {_HELP}")
            elif line:
                _answer(talk, line)


def _answer(talk: Conversation, line: str) -> None:
    """Writes the answer to a message as it comes; Ctrl-C ends it, not the program."""
    try:
        for piece in talk.ask(_text(line, "the message")):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" [stopped]")
    except UsageError as error:
        say(f"chat: {error}")
    sys.stdout.write("\n")
    sys.stdout.flush()


def _text(text: str, what: str) -> str:
    """Raises UsageError for what is no Unicode text, as a terminal of another encoding gives it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not UTF-8 text; give it in the encoding of the terminal") from None
    return text


def _lines() -> Iterator[str]:
    """What is typed, with a prompt and a history in a terminal, until Ctrl-D; the lines of what else is put in."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.strip()
        return
    import readline  # noqa: F401 - input() edits lines and keeps a history with it

    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            say("chat: Ctrl-D ends")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C as an exception: outside of a conversation it ends the process (`core.interrupt`)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
