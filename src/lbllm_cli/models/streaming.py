"""Text from a model folder as it comes: `lbllm generate`."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, TextIteratorStreamer

from lbllm_cli.core.errors import RunError, UsageError, reason
from lbllm_cli.models import chat
from lbllm_cli.models.config import positions
from lbllm_cli.models.generation_settings import read_settings
from lbllm_cli.models.tokenizer import read_tokenizer
from lbllm_cli.models.whole_folder import check_folder, load_folder

# Tokens that `lbllm generate` writes where nobody says how many.
USUAL_TOKENS = 128


class _TimedStreamer(TextIteratorStreamer):  # type: ignore[misc]
    """Text as it comes, and when: the prompt is put first, as generation begins, then token by token."""

    def __init__(self, tokenizer: Any, **options: Any):
        super().__init__(tokenizer, **options)
        self.prompt = 0
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.times:
            self.prompt = value.numel()
        self.times.append(time.perf_counter())
        super().put(value)

    def speed(self) -> str:
        """One line; the first new token counts as the prompt's."""
        start, first, last = self.times[0], self.times[1], self.times[-1]
        decoded = len(self.times) - 2
        line = f"prefill {self.prompt} tokens, {self.prompt / (first - start):.1f} tokens/s"
        return line + (f"; decode {decoded} tokens, {decoded / (last - first):.1f} tokens/s" if decoded else "")


def _encode(tokenizer: Any, prompt: str, raw: bool) -> dict[str, Tensor]:
    """The prompt's tokens and mask, int64 [1, length]. raw: without the chat template."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("--prompt is not UTF-8 text; give it in the encoding of the terminal") from None
    templated = bool(tokenizer.chat_template) and not raw
    if templated:
        prompt = chat.render(tokenizer, [{"role": "user", "content": prompt}], "--prompt", add_generation_prompt=True)
    try:
        # A template writes the special tokens out.
        found = tokenizer(prompt, add_special_tokens=not templated, return_tensors="pt")
        inputs = {name: found[name].long() for name in ("input_ids", "attention_mask")}
    except Exception as error:  # of any kind, by a tokenizer that does not fit its files
        raise UsageError(f"{tokenizer.name_or_path}: the tokenizer cannot encode --prompt: {reason(error)}") from None
    if not inputs["input_ids"].numel():
        raise UsageError("--prompt is empty, and the tokenizer has nothing that it begins with; give some text")
    return inputs


def _room(config: PretrainedConfig, tokens: Tensor, wanted: int | None) -> int:
    """How many tokens to write after `tokens`, int64 [1, length]. wanted: None for as many as usual, or as there is room for.

    Raises UsageError for a prompt that is not the model's, or that leaves it less room than is wanted.
    """
    vocab = config.get_text_config().vocab_size
    if int(tokens.max()) >= vocab:
        raise UsageError(
            f"the tokenizer gives token {int(tokens.max())} for --prompt, the model has {vocab}; copy the model's own tokenizer"
        )
    limit = positions(config)
    if limit is None:
        return wanted or USUAL_TOKENS
    room = limit - tokens.shape[1]
    if room < 1:
        raise UsageError(f"--prompt has {tokens.shape[1]} tokens, the model has {limit} positions; shorten it")
    if wanted is not None and wanted > room:
        raise UsageError(
            f"--max-new-tokens {wanted}: the prompt has {tokens.shape[1]} tokens, the model {limit} positions; give at most "
            f"{room}"
        )
    return min(USUAL_TOKENS, room) if wanted is None else wanted


def _finite_scores(tokens: Tensor, scores: Tensor) -> Tensor:
    """Lets predictions [rows, vocab] through. Raises RunError for NaN, which the likeliest token would be chosen from."""
    if not bool(torch.isfinite(scores.amax())):
        raise RunError(f"the model's predictions after {tokens.shape[1]} tokens are not finite; it cannot run in its own dtype")
    return scores


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


def stream_text(folder: Path, wanted: Request, device: torch.device, report: Callable[[str], None]) -> Iterator[str]:
    """Text of a packed or dense model folder, piece by piece. report: called at the end with a line about speed.

    Raises UsageError for a folder or a prompt that cannot be used, before a weight is read where its files tell.
    """
    import lbllm_cli.hf

    config = check_folder(folder, wanted.trust_remote_code)
    settings = read_settings(folder)
    tokenizer = read_tokenizer(folder, wanted.trust_remote_code)
    inputs = _encode(tokenizer, wanted.prompt, wanted.raw)
    room = _room(config, inputs["input_ids"], wanted.max_new_tokens)
    model = load_folder(folder, config, wanted.trust_remote_code, device_map={"": device})
    if settings is not None:
        model.generation_config = settings
    lbllm_cli.hf.quantize_activations(model, not wanted.full_activations)
    streamer = _TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options: dict[str, Any] = {"max_new_tokens": room, "streamer": streamer, "do_sample": wanted.temperature > 0}
    if wanted.temperature > 0:
        options |= {"temperature": wanted.temperature}
    options["logits_processor"] = [_finite_scores]
    stop = Event()
    options["stopping_criteria"] = [lambda ids, scores, **_: torch.full(ids.shape[:1], stop.is_set(), device=ids.device)]
    failure: list[BaseException] = []

    def work() -> None:
        try:
            torch.manual_seed(wanted.seed)  # generate() takes no generator; this process does nothing else
            model.generate(**{name: tensor.to(device) for name, tensor in inputs.items()}, **options)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work)
    thread.start()
    try:
        yield from streamer
    finally:
        # On an interrupt too, or when the reader has enough: it would go on to its last token.
        stop.set()
        thread.join()
    if failure:
        raise failure[0]
    report(streamer.speed())
