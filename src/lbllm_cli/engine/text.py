"""Tokens and text of a session, one after another."""

from collections.abc import Collection, Iterator
from typing import Any

from tokenizers.decoders import DecodeStream

from lbllm_cli.core.errors import RunError
from lbllm_cli.engine.model import Sampler, Session


def new_tokens(session: Session, prompt: list[int], sampler: Sampler, count: int, ends: Collection[int]) -> Iterator[int]:
    """Draws up to `count` tokens behind a prompt, one of `ends` the last.

    prompt: tokens of the whole text. What the session has of them already is not computed again. Raises RunError where the
    model's predictions are not finite.
    """
    session.keep(_common(session.tokens, prompt))
    # Of the last token there must be logits.
    if len(session.tokens) == len(prompt):
        session.keep(len(prompt) - 1)
    coming = prompt[len(session.tokens) :]
    for number in range(count):
        logits = session.run(coming)
        try:
            token = sampler.draw(logits, session.tokens)
        except FloatingPointError:
            raise RunError(
                f"the model's predictions after {len(session.tokens)} tokens are not finite; it cannot run in its own dtype"
            ) from None
        yield token
        if token in ends or number + 1 == count:
            return
        coming = [token]


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two texts begin with alike: [1, 2, 3], [1, 2, 4, 5] -> 2."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


class Decoder:
    """Text of tokens as they come: a character of several tokens comes with the last of them, special tokens not at all."""

    def __init__(self, tokenizer: Any):
        """tokenizer: of transformers, with a tokenizer of `tokenizers` in it."""
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """What of the text is certain now."""
        lost = ""
        try:
            piece = self._step(token)
        except Exception as error:
            # Of tokens that are bytes one that belongs to no character spoils those beside it, a line break that was given among
            # them: what the stream has given does not begin what it has now, and it goes no further. A new one does.
            if not str(error).startswith("Invalid prefix"):
                raise
            self._stream, self._tokens, self._given = DecodeStream(skip_special_tokens=True), [], ""
            lost, piece = "\ufffd", self._step(token)
        self._tokens.append(token)
        self._given += piece
        return lost + piece

    def _step(self, token: int) -> str:
        return self._stream.step(self._tokenizer.backend_tokenizer, token) or ""

    def rest(self) -> str:
        """What was held back, of a text that ends within a character."""
        whole = str(self._tokenizer.backend_tokenizer.decode(self._tokens, skip_special_tokens=True))
        return whole[len(self._given) :] if whole.startswith(self._given) else ""
