"""Which tier of the compiled library is taken, and what is refused."""

import logging

import pytest

from lbllm_cli.core.errors import UsageError
from lbllm_cli.engine import abi as kernels
from lbllm_cli.engine.abi import TIERS, library, tier
from lbllm_cli.engine.location import library_path

if library_path() is None:
    pytest.skip("this installation has no compiled kernels", allow_module_level=True)


def test_the_variable_chooses_a_tier(choose):
    assert choose("off") is None
    assert tier(choose("portable")) == "portable"
    assert choose("") is not None
    with pytest.raises(UsageError, match="LBLLM_KERNELS=fastest: expected auto, off, or one of portable, avx2, avxvnni, avx512"):
        choose("fastest")


def test_a_tier_that_is_not_here_is_refused(choose):
    lib = library()
    missing = [name for name in TIERS if lib.lbllm_choose_tier(name.encode())]
    lib.lbllm_choose_tier(b"portable")
    if not missing:
        pytest.skip("this CPU has every tier")
    with pytest.raises(UsageError, match=f"LBLLM_KERNELS={missing[0]}: not in this build, or not supported by this CPU"):
        choose(missing[0])


def test_without_a_library_one_warning_says_so(choose, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "library_path", lambda: None)
    monkeypatch.setattr(logging.getLogger("lbllm"), "propagate", True)
    with caplog.at_level(logging.WARNING, "lbllm"):
        assert choose("auto") is None
        assert library() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no compiled kernels" in caplog.text
    with pytest.raises(UsageError, match="LBLLM_KERNELS=avx2: this installation has no compiled kernels"):
        choose("avx2")
    assert choose("off") is None


def test_a_library_of_another_abi_is_refused(choose, monkeypatch):
    monkeypatch.setattr(kernels, "ABI", 99)
    with pytest.raises(UsageError, match="expected 99; install lbllm-cli again"):
        choose("auto")
