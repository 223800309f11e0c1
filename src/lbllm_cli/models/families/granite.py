"""Granite 3: embeddings, residuals, attention and logits are scaled; the first and the last outside the blocks."""

from lbllm_cli.models.families import Family

FAMILY = Family(
    "granite",
    "Granite 3",
    embedding_scale=lambda config: float(config.embedding_multiplier),
    logit_divisor=lambda config: float(config.logits_scaling),
)
