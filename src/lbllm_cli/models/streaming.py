"""Text from a model folder as it comes: `lbllm generate`."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from lbllm_cli.core.errors import RunError
from lbllm_cli.models.config import positions
from lbllm_cli.models.generation_settings import read_settings
from lbllm_cli.models.prompts import Request, encode, room
from lbllm_cli.models.tokenizer import read_tokenizer
from lbllm_cli.models.whole_folder import check_folder, load_folder


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


def _finite_scores(tokens: Tensor, scores: Tensor) -> Tensor:
    """Lets predictions [rows, vocab] through. Raises RunError for NaN, which the likeliest token would be chosen from."""
    if not bool(torch.isfinite(scores.amax())):
        raise RunError(f"the model's predictions after {tokens.shape[1]} tokens are not finite; it cannot run in its own dtype")
    return scores


def stream_text(folder: Path, wanted: Request, device: torch.device, report: Callable[[list[float], int], None]) -> Iterator[str]:
    """Text of a packed or dense model folder, piece by piece. report: called at the end with times, of the beginning
    and of each new token, and the number of tokens in the prompt.

    Raises UsageError for a folder or a prompt that cannot be used, before a weight is read where its files tell.
    """
    import lbllm_cli.hf

    config = check_folder(folder, wanted.trust_remote_code)
    settings = read_settings(folder)
    tokenizer = read_tokenizer(folder, wanted.trust_remote_code)
    tokens = encode(tokenizer, wanted.prompt, wanted.raw)
    count = room(positions(config), config.get_text_config().vocab_size, tokens, wanted.max_new_tokens)
    model = load_folder(folder, config, wanted.trust_remote_code, device_map={"": device})
    if settings is not None:
        model.generation_config = settings
    lbllm_cli.hf.quantize_activations(model, not wanted.full_activations)
    streamer = _TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options: dict[str, Any] = {"max_new_tokens": count, "streamer": streamer, "do_sample": wanted.temperature > 0}
    if wanted.temperature > 0:
        options |= {"temperature": wanted.temperature}
    options["logits_processor"] = [_finite_scores]
    stop = Event()
    options["stopping_criteria"] = [lambda ids, scores, **_: torch.full(ids.shape[:1], stop.is_set(), device=ids.device)]
    failure: list[BaseException] = []

    def work() -> None:
        try:
            torch.manual_seed(wanted.seed)  # generate() takes no generator; this process does nothing else
            prompt = torch.tensor([tokens], device=device)
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
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
    report(streamer.times, streamer.prompt)
