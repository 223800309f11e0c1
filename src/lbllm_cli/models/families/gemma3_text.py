"""Gemma 3, its text model: two rotary bases, one for sliding layers and one for full ones."""

from lbllm_cli.models.families import Family

FAMILY = Family(
    "gemma3_text",
    "Gemma 3",
    embedding_scale=lambda config: float(config.hidden_size**0.5),
    logit_cap=lambda config: config.final_logit_softcapping,
    norm_offset=1.0,
    begins=True,
    within=("gemma3",),
)
