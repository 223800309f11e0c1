"""Which linears share an input, found without values, whatever a configuration asks for."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lbllm_cli.runtime.units import find_units

UNITS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("rope", ["default", "dynamic", "yarn"])
def test_units_of_llama(attention, rope):
    rotary = {"rope_type": rope, "rope_theta": 10000.0, **({} if rope == "default" else {"factor": 2.0})}
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=64,
        rope_parameters=rotary, max_position_embeddings=64,
    )  # fmt: skip
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config).get_decoder()
    decoder.config._attn_implementation = attention
    kind = decoder.rotary_emb.rope_type
    assert find_units(decoder, [name for unit in UNITS for name in unit]) == UNITS
    assert (decoder.config._attn_implementation, decoder.rotary_emb.rope_type) == (attention, kind)
