"""Loops that do nearly the same thousands of times: a few rounds are run, and count for all."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from simulated_gpu.accounting import Accounts

# Rounds up to which a loop is run as it is.
_ALL = 8


def sampled(accounts: Accounts) -> Callable[..., Iterator[int]]:
    """`range` that runs the first round, the middle one, which counts for all between, and the last.

    Exact where what a round does grows or shrinks evenly.
    """

    def rounds(*bounds: int) -> Iterator[int]:
        every = range(*bounds)
        if len(every) <= _ALL:
            yield from every
            return
        yield every[0]
        before, accounts.weight = accounts.weight, accounts.weight * (len(every) - 2)
        try:
            yield every[len(every) // 2]
        finally:
            accounts.weight = before
        yield every[-1]

    return rounds


def sample(accounts: Accounts, *modules: str) -> None:
    """Loops over `range` in some modules are sampled."""
    for name in modules:
        module: Any = import_module(name)
        module.range = sampled(accounts)
