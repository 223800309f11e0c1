"""What something was made from: nested values as dotted keys, their hash, and what differs between two of them."""

import json
import re
from hashlib import sha256
from typing import Any


def fingerprint(inputs: dict[str, Any]) -> str:
    """Hash of everything a result depends on."""
    return sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """One line per input that differs, "" when none does; of hashes the first digits."""
    keys = sorted(before.keys() | now.keys())
    return "\n".join(
        f"  {key}: {_shown(before.get(key, 'absent'))} -> {_shown(now.get(key, 'absent'))}"
        for key in keys
        if before.get(key) != now.get(key)
    )


def _shown(value: Any) -> str:
    return re.sub(r"\b[0-9a-f]{64}\b", lambda found: found[0][:12], str(value))


def flatten(values: Any, prefix: str) -> dict[str, Any]:
    """Nested values to dotted keys: {"a": {"b": 1}} under "p" -> {"p.a.b": 1}."""
    if isinstance(values, dict):
        return {key: leaf for name, value in values.items() for key, leaf in flatten(value, f"{prefix}.{name}").items()}
    if isinstance(values, list):
        return {key: leaf for i, value in enumerate(values) for key, leaf in flatten(value, f"{prefix}[{i}]").items()}
    return {prefix: values}
