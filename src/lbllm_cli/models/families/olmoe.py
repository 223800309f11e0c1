"""OLMoE: norms of all queries and of all keys together."""

from lbllm_cli.models.families import Family

FAMILY = Family("olmoe", "OLMoE")
