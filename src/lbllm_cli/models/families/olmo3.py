"""OLMo 3: as OLMo 2, with sliding layers."""

from lbllm_cli.models.families import Family

FAMILY = Family("olmo3", "OLMo 3")
