"""Text from a model folder as it comes, by transformers: `lbllm generate` and `lbllm chat`."""

import time
from collections.abc import Callable, Generator, Iterator
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

    def __init__(self, tokenizer: Any, times: list[float], **options: Any):
        super().__init__(tokenizer, **options)
        self.times = times

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)


def _finite_scores(tokens: Tensor, scores: Tensor) -> Tensor:
    """Lets predictions [rows, vocab] through. Raises RunError for NaN, which the likeliest token would be chosen from."""
    if not bool(torch.isfinite(scores.amax())):
        raise RunError(f"the model's predictions after {tokens.shape[1]} tokens are not finite; it cannot run in its own dtype")
    return scores


class TextModel:
    """A packed or dense model folder that transformers writes text with. Its files are checked at once, `load` reads weights.

    limit: positions of the model, None where it has no limit. Raises UsageError for a folder that cannot be used.
    """

    def __init__(self, folder: Path, trust_remote_code: bool):
        self.folder, self.trusted = folder, trust_remote_code
        self.config = check_folder(folder, trust_remote_code)
        self.settings = read_settings(folder)
        self.tokenizer = read_tokenizer(folder, trust_remote_code)
        self.limit, self.vocab = positions(self.config), int(self.config.get_text_config().vocab_size)
        self._model: Any = None

    def load(self, device: torch.device, full_activations: bool = False) -> None:
        """Reads the weights. full_activations: activations, keys and values are not quantized."""
        import lbllm_cli.hf

        self._model = load_folder(self.folder, self.config, self.trusted, device_map={"": device})
        if self.settings is not None:
            self._model.generation_config = self.settings
        lbllm_cli.hf.quantize_activations(self._model, not full_activations)

    def pieces(self, tokens: list[int], count: int, temperature: float, times: list[float]) -> Generator[str, None, None]:
        """Text behind a prompt of tokens, piece by piece, at most `count` tokens of it.

        times: filled with the time of the beginning and of each new token. Where nobody takes more, the model stops.
        """
        streamer = _TimedStreamer(self.tokenizer, times, skip_prompt=True, skip_special_tokens=True)
        options: dict[str, Any] = {"max_new_tokens": count, "streamer": streamer, "do_sample": temperature > 0}
        if temperature > 0:
            options |= {"temperature": temperature}
        options["logits_processor"] = [_finite_scores]
        stop, device = Event(), self._model.device
        options["stopping_criteria"] = [lambda ids, scores, **_: torch.full(ids.shape[:1], stop.is_set(), device=device)]
        failure: list[BaseException] = []

        def work() -> None:
            try:
                prompt = torch.tensor([tokens], device=device)
                # A thread has a mode of its own.
                with torch.no_grad():
                    self._model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
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


def stream_text(folder: Path, wanted: Request, device: torch.device, report: Callable[[list[float], int], None]) -> Iterator[str]:
    """Text of a model folder, piece by piece. report: called at the end with times, of the beginning and of each new token, and
    the number of tokens in the prompt.

    Raises UsageError for a folder or a prompt that cannot be used, before a weight is read where its files tell.
    """
    model = TextModel(folder, wanted.trust_remote_code)
    tokens = encode(model.tokenizer, wanted.prompt, wanted.raw)
    count = room(model.limit, model.vocab, tokens, wanted.max_new_tokens)
    model.load(device, wanted.full_activations)
    torch.manual_seed(wanted.seed)  # generate() takes no generator; this process does nothing else
    times: list[float] = []
    yield from model.pieces(tokens, count, wanted.temperature, times)
    report(times, len(tokens))
