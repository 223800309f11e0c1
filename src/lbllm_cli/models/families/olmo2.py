"""OLMo 2: norms after attention and MLP, and of all queries and keys together."""

from lbllm_cli.models.families import Family

FAMILY = Family("olmo2", "OLMo 2")
