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

from lbllm_cli.core.errors import LbllmError

# A refusal: ours, or torch's own of shapes that do not fit. What else is raised is a wrapper that has tripped.
REFUSALS = (ValueError, RuntimeError, IndexError, LbllmError)
# Mean difference of outputs, relative to their mean size: inputs between two levels may tip either way.
CLOSE = 0.1
# What torch refuses for its types alone, and records whose marks are no table's: any value is as good as another.
LENIENT = {
    "layer_mask_of_integers",
    "layer_hidden_of_doubles",
    "bias_of_doubles",
    "random_records",
    "records_of_large_marks",
    "head complex",
    "head integers",
}


def compare(name: str, got: Any, expected: Any) -> str:
    """`right`, `refused`, or what is wrong, of two outcomes of a case: tensors or exceptions."""
    if isinstance(got, Exception):
        shown = f"{type(got).__name__}: {str(got).splitlines()[0] if str(got) else ''}"[:150]
        return f"refused, {shown}" if isinstance(got, REFUSALS) else f"WRONG: raised {shown}"
    if isinstance(expected, Exception):
        if name in LENIENT:
            return "computed, which torch does not"
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


def isolated(name: str, function: Callable[[Any], Any], subject: Any, reference: Any, judge: Callable[..., str]) -> None:
    """Prints what `judge` says of a case, in a child whose death is a result too."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        print(f"{name}: {judge(name, outcome(function, subject), outcome(function, reference))}", flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print(f"{name}: WRONG: ended with {status}", flush=True)


def alive(*_: Any) -> str:
    """Of a case that has only to come back."""
    return "came back"


def load(folder: Path, library: Path | None) -> Any:
    """The model through this library; None: in torch."""
    from transformers import AutoModelForCausalLM

    import lbllm_cli.hf  # noqa: F401 - registers the packed format
    from lbllm_cli.engine import abi

    abi.library.cache_clear()
    abi.library_path = lambda: library  # type: ignore[assignment]
    os.environ["LBLLM_KERNELS"] = "off" if library is None else os.environ.get("HOSTILE_TIER", "auto")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def main(library: Path, export: Path) -> None:
    import hostile_models
    import hostile_parts

    torch.set_num_threads(1)
    reference, model = load(export, None), load(export, library)
    from lbllm_cli.engine.abi import library as loaded
    from lbllm_cli.engine.abi import tier

    found = loaded()
    print(f"tier {tier(found)}")
    if Path(found._name) != library:
        raise SystemExit(f"{found._name} was loaded, not {library}")
    for name, function in hostile_models.MODEL.items():
        isolated(name, function, model, reference, compare)
    for name, function in hostile_models.MODEL_NUMBERS.items():
        isolated(name, function, model, reference, alive)
    for name, function in hostile_parts.cases(model).items():
        isolated(name, function, True, False, compare)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
