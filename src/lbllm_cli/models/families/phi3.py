"""Phi-3 and Phi-4: q, k and v are one linear, gate and up another."""

from lbllm_cli.models.families import Family

FAMILY = Family("phi3", "Phi-3 and Phi-4")
