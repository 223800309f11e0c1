"""Qwen2 and Qwen2.5."""

from lbllm_cli.models.families import Family

FAMILY = Family("qwen2", "Qwen2 and Qwen2.5")
