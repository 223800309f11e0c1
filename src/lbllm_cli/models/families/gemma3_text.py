"""Gemma 3, its text model: as Gemma 2, with two rotary bases, one for sliding layers and one for full ones."""

from dataclasses import replace

from lbllm_cli.models.families import gemma2

# One channel has most of the energy between its blocks (scripts/channels.py), and the usual rates made six of 18 worse at first.
_DRAFTED = {
    "distill": {"lr_weights": 0.01, "lr_levels": 0.005, "channel_cap": 10},
    "act_calib": {"lr_levels": 0.0025, "channel_cap": 10},
}
FAMILY = replace(
    gemma2.FAMILY, model_type="gemma3_text", text="Gemma 3", within=("gemma3",), drafted=_DRAFTED, measured="Gemma 3 270M"
)
