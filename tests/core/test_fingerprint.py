"""Flat keys and the hash of them."""

from lbllm_cli.pipeline import checkpoint


def test_flat_keys_and_fingerprints():
    assert checkpoint.flatten({"a": [{"b": 1}, {"b": None}], "c": "x"}, "p") == {"p.a[0].b": 1, "p.a[1].b": None, "p.c": "x"}
    assert checkpoint.fingerprint({"a": 1, "b": 2}) == checkpoint.fingerprint({"b": 2, "a": 1})
    assert checkpoint.fingerprint({"a": 1}) != checkpoint.fingerprint({"a": 2})
