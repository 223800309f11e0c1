"""Mistral."""

from lbllm_cli.models.families import Family

FAMILY = Family("mistral", "Mistral", within=("mistral3",))
