"""Gemma 2: embeddings are scaled, norms are stored about zero, logits have a soft cap."""

from lbllm_cli.models.families import Family

FAMILY = Family(
    "gemma2",
    "Gemma 2",
    embedding_scale=lambda config: float(config.hidden_size**0.5),
    logit_cap=lambda config: config.final_logit_softcapping,
    plain_softmax=False,
    norm_offset=1.0,
    begins=True,
)
