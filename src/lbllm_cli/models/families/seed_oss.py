"""Seed-OSS."""

from lbllm_cli.models.families import Family

FAMILY = Family("seed_oss", "Seed-OSS")
