"""Arguments of operators: tensors, numbers, and lists of them. torch's own walk over them takes ten times as long."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

Change = Callable[[Any], Any]


def mapped(change: Change, given: Iterable[Any]) -> Any:
    """Arguments of the same form with every tensor changed."""
    found = [
        change(x) if isinstance(x, Tensor) else mapped(change, x) if isinstance(x, list | tuple) and x else x for x in given
    ]  # fmt: skip
    if isinstance(given, list):
        return found
    # torch.Size and what operators return under names are tuples of their own kind.
    return type(given)(found) if isinstance(given, tuple) else tuple(found)


def mapped_values(change: Change, given: dict[str, Any]) -> dict[str, Any]:
    """The same of named arguments."""
    return dict(zip(given, mapped(change, list(given.values())), strict=True))


def tensors_of(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """All tensors of a call."""
    found: list[Tensor] = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += tensors_of(x, {})
    return found
