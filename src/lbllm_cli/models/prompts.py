"""A prompt as tokens, and how many may follow it: what is checked for every engine."""

from dataclasses import dataclass
from typing import Any

from lbllm_cli.core.errors import UsageError, reason
from lbllm_cli.models import chat

# Tokens that `lbllm generate` writes where nobody says how many.
USUAL_TOKENS = 128


@dataclass(frozen=True)
class Request:
    """A text that is wanted.

    raw: continue the prompt as it is; otherwise the chat template is applied where there is one. max_new_tokens: None for
    USUAL_TOKENS, or as many as the model has positions for. temperature: 0 for the likeliest token. full_activations: do not
    quantize activations, keys and values. trust_remote_code: whether code that the folder brings may run.
    """

    prompt: str
    raw: bool = False
    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    full_activations: bool = False
    trust_remote_code: bool = False


def encode(tokenizer: Any, prompt: str, raw: bool) -> list[int]:
    """The prompt's tokens. raw: without the chat template. Raises UsageError for what is no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("--prompt is not UTF-8 text; give it in the encoding of the terminal") from None
    templated = bool(tokenizer.chat_template) and not raw
    if templated:
        prompt = chat.render(tokenizer, [{"role": "user", "content": prompt}], "--prompt", add_generation_prompt=True)
    # A template writes the special tokens out.
    return tokens_of(tokenizer, prompt, "--prompt", add_special_tokens=not templated)


def tokens_of(tokenizer: Any, text: str, where: str, add_special_tokens: bool) -> list[int]:
    """Tokens of a text. where: what messages of errors name. Raises UsageError for a tokenizer that does not fit its files."""
    try:
        return [int(token) for token in tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]]
    except Exception as error:  # of any kind, by a tokenizer that does not fit its files
        raise UsageError(f"{tokenizer.name_or_path}: the tokenizer cannot encode {where}: {reason(error)}") from None


def check_tokens(tokens: list[int], vocab: int, where: str) -> None:
    """Raises UsageError for a prompt of no tokens, and one that is not the model's. where: what messages of errors name."""
    if not tokens:
        raise UsageError(f"{where} is empty, and the tokenizer has nothing that it begins with; give some text")
    if max(tokens) >= vocab:
        raise UsageError(
            f"the tokenizer gives token {max(tokens)} for {where}, the model has {vocab}; copy the model's own tokenizer"
        )


def left(limit: int | None, vocab: int, tokens: list[int], where: str) -> int | None:
    """Positions of the model behind a prompt; None where it has no limit. limit: all of them. where: as for `check_tokens`.

    Raises UsageError for a prompt that is none or not the model's, or that leaves no position.
    """
    check_tokens(tokens, vocab, where)
    if limit is None:
        return None
    if len(tokens) >= limit:
        raise UsageError(f"{where} has {len(tokens)} tokens, the model has {limit} positions; shorten it")
    return limit - len(tokens)


def room(limit: int | None, vocab: int, tokens: list[int], wanted: int | None) -> int:
    """How many tokens to write after `tokens`. limit: positions of the model, None where it has no limit.

    wanted: None for as many as usual, or as there is room for. Raises UsageError for a prompt that is none or not the model's,
    or that leaves it less room than is wanted.
    """
    most = left(limit, vocab, tokens, "--prompt")
    if most is None:
        return wanted or USUAL_TOKENS
    if wanted is not None and wanted > most:
        raise UsageError(
            f"--max-new-tokens {wanted}: the prompt has {len(tokens)} tokens, the model {limit} positions; give at most {most}"
        )
    return min(USUAL_TOKENS, most) if wanted is None else wanted
