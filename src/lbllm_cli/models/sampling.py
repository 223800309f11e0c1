"""Text from a model that is whole in memory: `lbllm generate`, and calibration text for `generate:` sources."""

import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, TextIteratorStreamer

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.errors import RunError, UsageError, reason
from lbllm_cli.models import chat
from lbllm_cli.models.config import positions
from lbllm_cli.models.generation_settings import read_settings
from lbllm_cli.models.model import SourceModel, read_tokenizer
from lbllm_cli.models.whole_folder import check_folder, load_folder
from lbllm_cli.recipe.base import Source
from lbllm_cli.runtime.attachments import Arguments

# Sequences sampled together: their keys and values lie in memory beside the whole model.
ROWS_AT_ONCE = 32
# Tokens that `lbllm generate` writes where nobody says how many.
USUAL_TOKENS = 128


def sample_tokens(model: SourceModel, tokenizer: Any, rows: int, length: int, seed: int, temperature: float) -> Tensor:
    """Samples text from the model itself: int64 [rows, length], without the start token.

    Starts from the tokenizer's BOS, or where it has none from single tokens drawn at random. Needs the whole model in memory.
    """
    # A family's own classes are always there, whatever code the folder brings.
    network = load_folder(model.folder, model.config, False, dtype=model.dtype).to(model.device)
    name = Arguments(network).name
    generator = torch.Generator(device=model.device).manual_seed(seed)
    pieces = []
    for start in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - start)
        if tokenizer.bos_token_id is not None:
            token = torch.full((count, 1), tokenizer.bos_token_id, device=model.device)
        else:
            vocab = int(model.config.vocab_size)
            token = torch.randint(vocab, (count, 1), generator=generator, device=model.device)
        cache, sampled = DynamicCache(config=network.config), []
        for _ in range(length):
            interrupt.check()
            out = network(token, use_cache=True, **{name: cache})
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
    return _sampled(path, (rows, length), int(model.config.vocab_size))


def _sampled(path: Path, shape: tuple[int, int], vocab: int) -> Tensor:
    """Text that was sampled before. Raises UsageError where it is not what the file's name says."""
    files.check_regular(path)
    try:
        tokens = load_file(path).get("input_ids")
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged ({error}); delete it: it is sampled again") from None
    usable = tokens is not None and tokens.dtype == torch.int64 and tokens.shape == shape
    if tokens is None or not usable or not bool(((tokens >= 0) & (tokens < vocab)).all()):
        expected = f"input_ids {list(shape)} of token numbers below {vocab}"
        raise UsageError(f"{path} is damaged (expected {expected}); delete it: it is sampled again")
    return tokens


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


def stream_text(
    folder: Path,
    prompt: str,
    raw: bool,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
    device: torch.device,
    full_activations: bool,
    report: Callable[[str], None],
    trust_remote_code: bool = False,
) -> Iterator[str]:
    """Text of a packed or dense model folder, piece by piece.

    raw: continue the prompt as it is; otherwise the chat template is applied where there is one. max_new_tokens: None for
    USUAL_TOKENS, or as many as the model has positions for. full_activations: do not quantize activations, keys and values.
    report: called at the end with a line about speed. trust_remote_code: whether code that the folder brings may run.

    Raises UsageError for a folder or a prompt that cannot be used, before a weight is read where its files tell.
    """
    import lbllm_cli.hf

    config = check_folder(folder, trust_remote_code)
    settings = read_settings(folder)
    tokenizer = read_tokenizer(folder, trust_remote_code)
    inputs = _encode(tokenizer, prompt, raw)
    room = _room(config, inputs["input_ids"], max_new_tokens)
    model = load_folder(folder, config, trust_remote_code, device_map={"": device})
    if settings is not None:
        model.generation_config = settings
    lbllm_cli.hf.quantize_activations(model, not full_activations)
    streamer = _TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options: dict[str, Any] = {"max_new_tokens": room, "streamer": streamer, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature}
    options["logits_processor"] = [_finite_scores]
    stop = Event()
    options["stopping_criteria"] = [lambda ids, scores, **_: torch.full(ids.shape[:1], stop.is_set(), device=ids.device)]
    failure: list[BaseException] = []

    def work() -> None:
        try:
            torch.manual_seed(seed)  # generate() takes no generator; this process does nothing else
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
