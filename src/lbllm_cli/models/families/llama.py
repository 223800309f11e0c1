"""Llama 1, 2, 3 and SmolLM."""

from lbllm_cli.models.families import Family

FAMILY = Family("llama", "Llama 1, 2, 3 and SmolLM")
