"""Where the program is: training steps and passes of hidden states, in which more is refused, and named phases of a measurement.

Functions of the package are wrapped by name before anything else imports them; one that is not there any more fails at once.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from simulated_gpu.device import Device, SimulatedTensor
from simulated_gpu.nested import mapped, mapped_values, tensors_of
from simulated_gpu.rules import PASS, STEP
from torch import Tensor

_STEP = ("lbllm_cli.training.loop", "TrainingLoop.step")
_PASS = ("lbllm_cli.pipeline.streams", "fetched")


def replace(module: str, path: str, change: Callable[[Any], Any]) -> None:
    """Puts `change(what is there)` in the place of a function or method of a module."""
    owner: Any = import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    setattr(owner, name, change(getattr(owner, name)))


class Regions:
    """Counts training steps and pieces of hidden states. stop: ("step" or "piece", n): SIGTERM comes after the n-th."""

    def __init__(self, device: Device):
        self.device = device
        self.stop: tuple[str, int] | None = None
        self.count: Counter[str] = Counter()

    def install(self) -> None:
        """Wraps the package's functions."""
        replace(*_PASS, self._passing)
        replace(*_STEP, self._stepping)

    def _met(self, kind: str) -> None:
        self.count[kind] += 1
        if self.stop == (kind, self.count[kind]):
            os.kill(os.getpid(), signal.SIGTERM)

    def _stepping(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.device.rules.within(STEP):
                found = step(*args, **kwargs)
            self._met("step")
            return found

        return inside

    def _passing(self, fetched: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @wraps(fetched)
        def inside(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with self.device.rules.within(PASS):
                for piece in fetched(*args, **kwargs):
                    yield piece
                    self._met("piece")

        return inside


def phased(device: Device, module: str, path: str, phase: str) -> None:
    """Counts what a function does under the name of a phase."""

    def change(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with device.accounts.within(phase):
                return function(*args, **kwargs)

        return inside

    replace(module, path, change)


def share_inputs() -> None:
    """`SharedInput` of the device's tensors: a form without memory, of which everything is done with what it stands for.

    torch makes no second kind of subclass out of a tensor that is one already.
    """
    from lbllm_cli.runtime import shared_input

    kind: Any = shared_input.SharedInput
    plainly, usual = kind.of, kind.__torch_function__

    def stands_for(x: Tensor) -> Tensor:
        return x.plain if type(x) is kind and isinstance(x.plain, SimulatedTensor) else x

    def of(x: Tensor) -> Tensor:
        if not isinstance(x, SimulatedTensor):
            return plainly(x)
        shared = torch.empty(0).as_subclass(kind)
        shared.plain, shared.found, shared.version = x, {}, x._version
        return shared

    def through(cls: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        simulated = [x for x in tensors_of(args, named) if stands_for(x) is not x]
        if not simulated:
            return usual(function, types, args, named)
        if function not in shared_input._FORM:
            for x in simulated:
                x.found = None
        return function(*mapped(stands_for, args), **mapped_values(stands_for, named))

    kind.of, kind.__torch_function__ = staticmethod(of), classmethod(through)
