"""Frequencies of rotary embeddings."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("default", "linear", "llama3")


def frequencies(width: int, rope: dict[str, Any]) -> NDArray[np.float32]:
    """Radians per position: float32 [width / 2].

    rope: rope_type, one of KINDS, rope_theta, and what its type takes (linear: factor; llama3: that and low_freq_factor,
    high_freq_factor, original_max_position_embeddings). 64 at rope_theta 10,000 -> 1, 0.750, 0.562, ..., 1.33e-4. Raises KeyError
    where one is missing.
    """
    base = np.float32(rope["rope_theta"])
    with np.errstate(all="ignore"):  # a base of 0 gives what is not finite, which the caller looks for
        usual = (1 / base ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))).astype(np.float32)
    if rope["rope_type"] == "linear":
        return (usual / np.float32(rope["factor"])).astype(np.float32)
    if rope["rope_type"] == "llama3":
        return _stretched(usual, rope)
    return usual


def _stretched(usual: NDArray[np.float32], rope: dict[str, Any]) -> NDArray[np.float32]:
    """LLaMA 3.1: waves longer than the text of the first training are stretched, short ones stay, those between are mixed."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = float(rope["original_max_position_embeddings"])
    waves = 2 * math.pi / usual
    share = (trained / waves - low) / (high - low)
    mixed = (1 - share) * (usual / factor) + share * usual
    return np.where(waves > trained / low, usual / factor, np.where(waves < trained / high, usual, mixed)).astype(np.float32)


def known_positions(limit: int, rope: dict[str, Any]) -> int:
    """Positions of a model that was made for `limit`: rotary embeddings that are stretched know more."""
    start, factor = rope.get("original_max_position_embeddings", limit), rope.get("factor", 1)
    reached = start * factor if isinstance(start, int | float) and isinstance(factor, int | float) else limit
    return max(limit, int(reached)) if math.isfinite(reached) else limit
