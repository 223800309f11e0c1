#!/usr/bin/env python3
"""Print the oldest version of every dependency that pyproject.toml allows, as constraints for pip.

`make test-oldest` installs these. A requirement without a lower bound is refused: nobody could say what it was tested with.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?\s*>=\s*(?P<floor>[^,;\s]+)")


def floors(project: dict) -> dict[str, str]:
    """The lower bound of each requirement of a `[project]` table, extras included; ValueError where one has none."""
    extras = project.get("optional-dependencies", {}).values()
    found = {}
    for requirement in [*project["dependencies"], *(one for extra in extras for one in extra)]:
        match = REQUIREMENT.match(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} has no lower bound (NAME>=VERSION)")
        found[match["name"].lower()] = match["floor"]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Print the lower bounds of pyproject.toml as constraints for pip.")
    parser.add_argument("instead", nargs="*", metavar="NAME==VERSION", help="a version to take instead of a lower bound")
    args = parser.parse_args(argv)
    try:
        found = floors(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"])
        for pin in args.instead:
            name, separator, version = pin.partition("==")
            if not separator or name not in found:
                raise ValueError(f"expected NAME==VERSION of a dependency, got {pin!r}")
            found[name] = version
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{name}=={version}" for name, version in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
