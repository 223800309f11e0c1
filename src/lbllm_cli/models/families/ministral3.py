"""Ministral 3: queries are scaled by their position."""

from lbllm_cli.models.families import Family

FAMILY = Family("ministral3", "Ministral 3", within=("mistral3",))
