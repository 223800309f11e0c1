"""What pydantic finds wrong, in one line."""

import re

from pydantic import ValidationError


def describe(error: ValidationError) -> str:
    """The first thing that is wrong with a record, in one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(re.sub(r"\s+", " ", str(part))[:80] for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] in {"value_error", "missing"} else f", got {str(first['input'])[:80]!r}"
    return f"{where}: {message[:1].lower()}{message[1:]}{got}" if where else f"{message}{got}"
