"""SmolLM3: some layers have no rotary embedding."""

from lbllm_cli.models.families import Family

FAMILY = Family("smollm3", "SmolLM3")
