"""`lbllm chat`: a conversation in a terminal, or of the lines of a pipe."""

import io
import math
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lbllm_cli.cli.generate import speed
from lbllm_cli.cli.native import Engine, Native, open_native
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.model_folder import resolve
from lbllm_cli.engine.config import Unfit
from lbllm_cli.engine.model import Sampler, Session
from lbllm_cli.engine.text import Decoder, new_tokens
from lbllm_cli.models import chat as templates
from lbllm_cli.models.prompts import check_tokens, tokens_of

Message = dict[str, str]
# Of a model that knows none.
_NO_LIMIT = 1 << 20
_HELP = "Ctrl-C stops an answer, /reset forgets the conversation, Ctrl-D or /exit ends."


class Answers(Protocol):
    """What writes answers. limit: positions of the model. name: how it is called in the first line."""

    tokenizer: Any
    limit: int
    vocab: int
    name: str

    def load(self) -> None:
        """Reads the weights."""

    def pieces(self, prompt: list[int], count: int, times: list[float]) -> Generator[str, None, None]:
        """Text behind a prompt, at most `count` tokens; their times behind that of the beginning."""


class NativeAnswers:
    """By the native engine. What a prompt shares with the last one is not computed again."""

    def __init__(self, native: Native, seed: int):
        self._native, self._seed = native, seed
        self.tokenizer, self.limit, self.vocab = native.tokenizer, native.limit, native.vocab
        self.name = f"{native.threads} threads, native engine"

    def load(self) -> None:
        """As `Answers`. Raises Unfit where the weights are none that the library runs."""
        model = self._native.load()
        self._session, self._sampler = Session(model), Sampler(model.lib, self._native.sampling, self._seed)

    def pieces(self, prompt: list[int], count: int, times: list[float]) -> Generator[str, None, None]:
        """As `Answers`."""
        decoder = Decoder(self.tokenizer)
        times.append(time.perf_counter())
        for token in new_tokens(self._session, prompt, self._sampler, count, self._native.ends):
            times.append(time.perf_counter())
            yield decoder.add(token)
        yield decoder.rest()


class TorchAnswers:
    """By transformers, every time from the beginning."""

    def __init__(self, folder: Path, wishes: "Wishes"):
        import torch

        from lbllm_cli.models.streaming import TextModel
        from lbllm_cli.runtime.backend import choose_device

        device = choose_device(wishes.device, "--device")
        if wishes.threads:
            torch.set_num_threads(wishes.threads)
        self._model, self._device, self._temperature = TextModel(folder, False), device, wishes.temperature
        torch.manual_seed(wishes.seed)
        self.tokenizer, self.vocab = self._model.tokenizer, self._model.vocab
        self.limit = self._model.limit or _NO_LIMIT
        self.name = f"transformers on {device}"

    def load(self) -> None:
        """As `Answers`."""
        self._model.load(self._device)

    def pieces(self, prompt: list[int], count: int, times: list[float]) -> Generator[str, None, None]:
        """As `Answers`."""
        return self._model.pieces(prompt, count, self._temperature, times)


@dataclass
class Conversation:
    """Messages, and who answers them. most: tokens of an answer. speed: of the last one, in words."""

    answers: Answers
    most: int
    messages: list[Message]
    speed: str = ""

    def ask(self, text: str) -> Generator[str, None, None]:
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
        count = min(self.most, self.answers.limit - len(prompt))
        said: list[str] = []
        times: list[float] = []
        try:
            with closing(self.answers.pieces(prompt, count, times)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})
            self.speed = speed(times, len(prompt)) if len(times) > 1 else ""

    def _fitting(self) -> list[int]:
        """Tokens of the conversation, its oldest messages forgotten until there is room for an answer; or none at all."""
        room, kept = min(self.most, max(1, self.answers.limit // 4)), list(self.messages)
        while True:
            prompt = self._tokens(kept)
            if len(prompt) + room <= self.answers.limit:
                for _ in range((len(self.messages) - len(kept)) // 2):
                    say("chat: the oldest message and its answer are forgotten, the model has no more positions")
                self.messages[:] = kept
                return prompt
            first = 1 if kept[0]["role"] == "system" else 0
            if len(kept) - first < 3:
                raise UsageError(
                    f"the message has {len(prompt)} tokens with all that goes before it, the model {self.answers.limit} "
                    "positions; shorten it"
                )
            del kept[first : first + 2]

    def _tokens(self, messages: list[Message]) -> list[int]:
        text = templates.render(self.answers.tokenizer, messages, "the conversation", add_generation_prompt=True)
        tokens = tokens_of(self.answers.tokenizer, text, "the conversation", add_special_tokens=False)
        check_tokens(tokens, self.answers.vocab, "the conversation")
        return tokens


@dataclass(frozen=True)
class Wishes:
    """What the options say. max_new_tokens: of an answer, at most."""

    system: str | None
    temperature: float
    seed: int
    max_new_tokens: int
    device: str
    engine: Engine
    threads: int | None


def _loaded(folder: Path, wishes: Wishes) -> Answers:
    """Who answers, with the weights read, by the engine that is asked for; of `auto` the native one where it runs the folder.

    Raises UsageError for a model that is not made for conversations, before a weight is read.
    """
    if wishes.engine != "transformers":
        try:
            native = NativeAnswers(open_native(folder, wishes.device, wishes.temperature, wishes.threads), wishes.seed)
            return _checked(folder, native)
        except Unfit as error:
            if wishes.engine == "native":
                raise UsageError(f"--engine native cannot run {folder}: {error}; take --engine transformers") from None
    return _checked(folder, TorchAnswers(folder, wishes))


def _checked(folder: Path, answers: Answers) -> Answers:
    if not answers.tokenizer.chat_template:
        raise UsageError(f"{folder} has no chat template, it is not made for conversations; see `lbllm generate --raw`")
    answers.load()
    return answers


def chat(model: str, wishes: Wishes) -> None:
    """Talks until the end of the input. model: a folder or an id."""
    if math.isnan(wishes.temperature):
        raise UsageError("--temperature nan: expected a number from 0 to 2")
    folder = resolve(model, None, weights=True, key="--model")
    start = [{"role": "system", "content": _text(wishes.system, "--system")}] if wishes.system else []
    answers = _loaded(folder, wishes)
    talk = Conversation(answers, wishes.max_new_tokens, list(start))
    say(f"chat: {folder}, {answers.limit} positions, {answers.name}. {_HELP}")
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
    """Writes the answer to a message as it comes; Ctrl-C ends it, not the program. In a terminal its speed follows."""
    try:
        with closing(talk.ask(_text(line, "the message"))) as pieces:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" [stopped]")
    except UsageError as error:
        say(f"chat: {error}")
    sys.stdout.write("\n")
    sys.stdout.flush()
    if talk.speed and sys.stdin.isatty():
        say(f"chat: {talk.speed}")


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
