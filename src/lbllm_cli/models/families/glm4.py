"""GLM-4: gate and up are one linear; half of a head is rotated."""

from lbllm_cli.models.families import Family

FAMILY = Family("glm4", "GLM-4")
