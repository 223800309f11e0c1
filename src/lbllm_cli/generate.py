"""Text from a model that is whole in memory: `lbllm generate`, and calibration text for `generate:` sources."""

import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from lbllm_cli import files, interrupt
from lbllm_cli.errors import UsageError
from lbllm_cli.model import SourceModel
from lbllm_cli.packed_checks import refusing
from lbllm_cli.recipe_base import Source

# Sequences sampled together: their keys and values lie in memory beside the whole model.
ROWS_AT_ONCE = 32


def sample_tokens(model: SourceModel, tokenizer: Any, rows: int, length: int, seed: int, temperature: float) -> Tensor:
    """Samples text from the model itself: int64 [rows, length], without the start token.

    Starts from the tokenizer's BOS, or where it has none from single tokens drawn at random. Needs the whole model in memory.
    """
    network = AutoModelForCausalLM.from_pretrained(model.folder, dtype=model.dtype).to(model.device).eval()
    generator = torch.Generator(device=model.device).manual_seed(seed)
    pieces = []
    for start in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - start)
        if tokenizer.bos_token_id is not None:
            token = torch.full((count, 1), tokenizer.bos_token_id, device=model.device)
        else:
            vocab = int(model.config.vocab_size)
            token = torch.randint(vocab, (count, 1), generator=generator, device=model.device)
        cache, sampled = None, []
        for _ in range(length):
            interrupt.check()
            out = network(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            chances = torch.softmax(out.logits[:, -1].float() / temperature, dim=-1)
            token = torch.multinomial(chances, 1, generator=generator)
            sampled.append(token.cpu())
        pieces.append(torch.cat(sampled, dim=1))
    return torch.cat(pieces)


def cached_sample(model: SourceModel, tokenizer: Any, output: Path, item: Source, rows: int, length: int, seed: int) -> Tensor:
    """`sample_tokens`, kept in <output>/generated/ under a name that covers everything it depends on."""
    key = sha256(f"{model.identity()} {rows} {length} {seed} {item.temperature} {model.dtype}".encode()).hexdigest()[:16]
    path = output / "generated" / f"{key}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens = sample_tokens(model, tokenizer, rows, length, seed, item.temperature)
        files.write_atomic(path, lambda temporary: save_file({"input_ids": tokens}, temporary))
    return load_file(path)["input_ids"]


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


def stream_text(
    folder: Path,
    prompt: str,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device,
    full_activations: bool,
    report: Callable[[str], None],
) -> Iterator[str]:
    """Text of a packed or dense model folder, piece by piece.

    raw: continue the prompt as it is; otherwise the chat template is applied where there is one. full_activations: do not
    quantize activations, keys and values. report: called at the end with a line about speed.
    """
    import lbllm_cli.hf  # registers the packed format

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with refusing(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}).eval()
    lbllm_cli.hf.quantize_activations(model, not full_activations)
    if tokenizer.chat_template and not raw:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
        if not inputs["input_ids"].numel():
            raise UsageError("--prompt is empty, and the tokenizer has nothing that it begins with; give some text")
    streamer = _TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "streamer": streamer, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature}
    stop = Event()
    options["stopping_criteria"] = [lambda ids, scores, **_: torch.full(ids.shape[:1], stop.is_set(), device=ids.device)]
    failure: list[BaseException] = []

    def work() -> None:
        try:
            torch.manual_seed(seed)  # generate() takes no generator; this process does nothing else
            model.generate(**inputs.to(device), **options)
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
