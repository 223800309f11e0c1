"""`lbllm generate`."""

import io
import math
import sys

import torch

from lbllm_cli.core.console import say
from lbllm_cli.core.errors import UsageError
from lbllm_cli.models.folder import resolve
from lbllm_cli.models.streaming import Request, stream_text
from lbllm_cli.runtime.backend import choose_device


@torch.no_grad()
def generate(model: str, device: str, wanted: Request) -> None:
    """Streams a text to stdout. model: a folder or an id. device: as `--device` names it."""
    if math.isnan(wanted.temperature):
        raise UsageError("--temperature nan: expected a number from 0 to 2")
    chosen = choose_device(device, "--device")
    folder = resolve(model, None, weights=True, key="--model")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not have every character that a model writes
    speed: list[str] = []
    for piece in stream_text(folder, wanted, chosen, speed.append):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    say(f"generate: {speed[0]}, {torch.get_num_threads()} threads")
