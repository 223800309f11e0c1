"""Qwen3 mixtures of experts."""

from lbllm_cli.models.families import Family

FAMILY = Family("qwen3_moe", "Qwen3-MoE")
