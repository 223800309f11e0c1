"""Rotary frequencies against transformers' own."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lbllm_cli.engine.rope import frequencies, known_positions

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}, LLAMA3]
)
@pytest.mark.parametrize("width", [16, 64, 128])
def test_frequencies_are_those_of_transformers(rope, width):
    config = AutoConfig.for_model("llama", head_dim=width, hidden_size=4 * width, num_attention_heads=4, rope_parameters=rope)
    wanted = LlamaRotaryEmbedding(config).inv_freq.to(torch.float32).numpy()
    found = frequencies(width, rope)
    assert found.dtype == np.float32
    # One rounding: 6e-8.
    assert np.allclose(found, wanted, rtol=3e-7, atol=0)


def test_positions_of_stretched_embeddings():
    assert known_positions(100, {}) == 100
    assert known_positions(131072, LLAMA3) == 131072
    assert known_positions(64, {"factor": 4.0}) == 256
    assert known_positions(64, {"factor": float("inf")}) == 64
    assert known_positions(64, {"factor": "x"}) == 64
