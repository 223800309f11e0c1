"""Gemma 3, its text model: as Gemma 2, with two rotary bases, one for sliding layers and one for full ones."""

from dataclasses import replace

from lbllm_cli.models.families import gemma2

FAMILY = replace(gemma2.FAMILY, model_type="gemma3_text", text="Gemma 3", within=("gemma3",))
