"""Qwen3."""

from lbllm_cli.models.families import Family

FAMILY = Family("qwen3", "Qwen3")
