"""Kernels as operators of torch: what launches on a GPU, and nothing on tensors without values.

An operator writes into arguments that its schema marks as changed and returns nothing: shapes are the caller's business, so a
pass over tensors without values (`meta`) needs no second definition of them, and everything that watches operators sees one call
for one launch. Under TRITON_INTERPRET=1 the same launches run on the CPU, interpreted.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "lbllm"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _nothing(*_: Any, **__: Any) -> None:
    """On tensors without values there is nothing to write."""


def _where_it_lies(launch: Callable[..., None]) -> Callable[..., None]:
    """A launch on the GPU of its first argument: Triton's own choice is the current one, whatever tensors lie on."""

    def launched(first: torch.Tensor, *others: Any, **named: Any) -> None:
        with torch.cuda.device_of(first):
            launch(first, *others, **named)

    return launched


def operator(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a launch as torch.ops.lbllm.NAME.

    schema: name and arguments, those that are written marked: "scale(Tensor x, Tensor(a!) y)". Returns what calls it through
    torch's dispatcher.
    """
    name = schema.partition("(")[0]

    def register(launch: Callable[..., None]) -> Callable[..., None]:
        _LIBRARY.define(f"{schema} -> ()")
        _LIBRARY.impl(name, _where_it_lies(launch), "CUDA")
        _LIBRARY.impl(name, _nothing, "Meta")
        if INTERPRETED:
            _LIBRARY.impl(name, launch, "CPU")
        found: Callable[..., None] = getattr(torch.ops.lbllm, name)
        return found

    return register
