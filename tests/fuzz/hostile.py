"""Shapes, types and values that the library's Python wrappers must not pass on: run as a program, under the address sanitizer.

    python hostile.py LIBRARY EXPORT

Every case runs in a child of its own, through the kernels and in torch: it prints `name: right`, `refused` with the error, or
what is wrong. Where torch computes something the kernels compute the same or refuse; where torch raises they raise.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lbllm_cli.errors import LbllmError

# A refusal: ours, or torch's own of shapes that do not fit. What else is raised is a wrapper that has tripped.
REFUSALS = (ValueError, RuntimeError, IndexError, LbllmError)
# Mean difference of outputs, relative to their mean size: inputs between two levels may tip either way.
CLOSE = 0.1


def compare(got: Any, expected: Any) -> str:
    """`right`, `refused`, or what is wrong, of two outcomes: tensors or exceptions."""
    if isinstance(got, Exception):
        shown = f"{type(got).__name__}: {str(got).splitlines()[0] if str(got) else ''}"[:150]
        return f"refused, {shown}" if isinstance(got, REFUSALS) else f"WRONG: raised {shown}"
    if isinstance(expected, Exception):
        return f"WRONG: torch raises {type(expected).__name__}: {str(expected)[:120]}, the kernels computed {tuple(got.shape)}"
    if got.shape != expected.shape:
        return f"WRONG: shape {tuple(got.shape)}, torch gives {tuple(expected.shape)}"
    if not got.numel():
        return "right, nothing"
    finite = torch.isfinite(expected)
    if not bool(finite.all()):
        return "right, not finite" if not bool(torch.isfinite(got).all()) else "WRONG: finite where torch is not"
    away = float((got.double() - expected.double()).abs().mean() / expected.double().abs().mean().clamp(min=1e-30))
    return f"right, {away:.1e}" if away < CLOSE else f"WRONG: {away:.1e} from torch"


def outcome(function: Callable[[Any], Any], subject: Any) -> Any:
    """What a case gives or raises."""
    try:
        with torch.no_grad():
            return function(subject).detach()
    except Exception as error:
        return error


def isolated(name: str, work: Callable[[], str]) -> None:
    """Prints what `work` says, in a child whose death is a result too."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        print(f"{name}: {work()}", flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print(f"{name}: WRONG: ended with {status}", flush=True)


def load(folder: Path, library: Path | None) -> Any:
    """The model through this library; None: in torch."""
    from transformers import AutoModelForCausalLM

    import lbllm_cli.hf  # noqa: F401 - registers the packed format
    from lbllm_cli.kernels import library as loading

    loading.library.cache_clear()
    loading.library_path = lambda: library  # type: ignore[assignment]
    os.environ["LBLLM_KERNELS"] = "off" if library is None else os.environ.get("HOSTILE_TIER", "auto")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def main(library: Path, export: Path) -> None:
    import hostile_models
    import hostile_parts

    torch.set_num_threads(1)
    reference, model = load(export, None), load(export, library)
    from lbllm_cli.kernels.library import library as loaded
    from lbllm_cli.kernels.library import tier

    print(f"tier {tier(loaded())}")
    for name, function in hostile_models.MODEL.items():
        isolated(name, lambda function=function: compare(outcome(function, model), outcome(function, reference)))  # type: ignore[misc]
    for name, function in hostile_parts.cases(model).items():
        isolated(name, lambda function=function: compare(outcome(function, True), outcome(function, False)))  # type: ignore[misc]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
