"""Formats of exports: every file in this folder is one, named as `export.format` names it, with `_` for a hyphen."""

from importlib import import_module
from typing import cast

from lbllm_cli.export.base import Exporter


def exporter(name: str) -> Exporter:
    """A format by its name, which the recipe has checked."""
    return cast(Exporter, import_module(f"{__name__}.{name.replace('-', '_')}").FORMAT)
