"""Attention whose logits have a soft cap."""

from typing import Any

# transformers' `sdpa` drops the cap without a word. Where nothing is chosen, transformers up to 5.20 takes it for Gemma 2.
_DROPS = (None, "sdpa")


def keep_soft_cap(config: Any) -> None:
    """Chooses eager attention where the configuration has a soft cap that what is chosen would drop.

    config: of a model, or of one with a text model inside. A built model's counts as well: it asks at each call.
    """
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) is not None and text._attn_implementation in _DROPS:
        text._attn_implementation = "eager"
