"""Tiers of the compiled library."""

from collections.abc import Callable
from typing import Any

import pytest

from lbllm_cli.engine.abi import TIERS, VARIABLE, library, tier


@pytest.fixture
def restored():
    """The tier is the library's state, not only this process's variable: it is put back."""
    library.cache_clear()
    lib = library()
    before = tier(lib)
    yield
    library.cache_clear()
    lib.lbllm_choose_tier(before.encode())


@pytest.fixture
def choose(restored, monkeypatch) -> Callable[[str], Any]:
    """choose(name): the library as LBLLM_KERNELS=name gives it."""

    def named(name: str):
        monkeypatch.setenv(VARIABLE, name)
        library.cache_clear()
        return library()

    return named


@pytest.fixture(params=TIERS)
def lib(request, choose):
    """The library with each tier of this CPU."""
    if library().lbllm_choose_tier(request.param.encode()):
        pytest.skip(f"this CPU or this build has no {request.param}")
    return choose(request.param)
