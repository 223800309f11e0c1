"""`lbllm generate`."""

import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lbllm_cli.cli.native import Engine, Native, open_native
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.model_folder import resolve
from lbllm_cli.engine.config import Unfit
from lbllm_cli.engine.model import Sampler, Session
from lbllm_cli.engine.text import Decoder, new_tokens
from lbllm_cli.models.prompts import Request, encode, room


def generate(model: str, device: str, engine: Engine, threads: int | None, wanted: Request) -> None:
    """Streams a text to stdout. model: a folder or an id. device, engine, threads: as their options name them."""
    if math.isnan(wanted.temperature):
        raise UsageError("--temperature nan: expected a number from 0 to 2")
    folder = resolve(model, None, weights=True, key="--model")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not have every character that a model writes
    said: list[str] = []
    for piece in _pieces(folder, device, engine, threads, wanted, said.append):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    say(f"generate: {said[0]}")


def _pieces(
    folder: Path, device: str, engine: Engine, threads: int | None, wanted: Request, report: Callable[[str], None]
) -> Iterator[str]:
    """The text, by the engine that is asked for; of `auto` the native one where it runs the folder."""
    if engine != "transformers":
        try:
            if wanted.full_activations:
                raise Unfit("--full-activations")
            return _native_pieces(open_native(folder, device, wanted.temperature, threads), wanted, report)
        except Unfit as error:
            if engine == "native":
                raise UsageError(f"--engine native cannot run {folder}: {error}; take --engine transformers") from None
    return _torch_pieces(folder, device, threads, wanted, report)


def _native_pieces(native: Native, wanted: Request, report: Callable[[str], None]) -> Iterator[str]:
    prompt = encode(native.tokenizer, wanted.prompt, wanted.raw)
    count = room(native.limit, native.vocab, prompt, wanted.max_new_tokens)
    model = native.load()
    session, decoder = Session(model, len(prompt) + count), Decoder(native.tokenizer)
    sampler = Sampler(model.lib, native.sampling, wanted.seed)

    def stream() -> Iterator[str]:
        times = [time.perf_counter()]
        for token in new_tokens(session, prompt, sampler, count, native.ends):
            times.append(time.perf_counter())
            yield decoder.add(token)
        yield decoder.rest()
        report(f"{speed(times, len(prompt))}, {model.threads} threads, native engine")

    return stream()


def _torch_pieces(
    folder: Path, device: str, threads: int | None, wanted: Request, report: Callable[[str], None]
) -> Iterator[str]:
    import torch

    from lbllm_cli.models.streaming import stream_text
    from lbllm_cli.runtime.backend import choose_device

    chosen = choose_device(device, "--device")
    if threads:
        torch.set_num_threads(threads)

    def times_of(times: list[float], prompt: int) -> None:
        report(f"{speed(times, prompt)}, {torch.get_num_threads()} threads, transformers")

    yield from stream_text(folder, wanted, chosen, times_of)


def speed(times: list[float], prompt: int) -> str:
    """One line. times: of the beginning, and of each new token, of which the first counts as the prompt's."""
    start, first, last, decoded = times[0], times[1], times[-1], len(times) - 2
    line = f"prefill {prompt} tokens, {prompt / (first - start):.1f} tokens/s"
    return line + (f"; decode {decoded} tokens, {decoded / (last - first):.1f} tokens/s" if decoded else "")
