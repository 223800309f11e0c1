"""Flat keys and the hash of them."""

from lbllm_cli.core.fingerprint import fingerprint, flatten


def test_flat_keys_and_fingerprints():
    assert flatten({"a": [{"b": 1}, {"b": None}], "c": "x"}, "p") == {"p.a[0].b": 1, "p.a[1].b": None, "p.c": "x"}
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
