"""Experts that are modules against transformers' fused ones: outputs, routing, copies."""

import copy

import pytest
import torch
from conftest import save_toy
from torch import nn
from transformers import AutoModelForCausalLM

from lbllm_cli.format.names import input_name
from lbllm_cli.models.model import open_model
from lbllm_cli.recipe.schema import Model
from lbllm_cli.runtime.experts import Experts, expert_of, experts_of, separate_experts

CPU = torch.device("cpu")


@pytest.fixture
def both(tmp_path):
    """Experts of a block, and transformers' own."""
    folder = save_toy(tmp_path / "model", "gpt-oss")
    fused = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[0].mlp.experts
    return experts_of(open_model(Model(path=str(folder)), CPU).block(0).layer), fused


@torch.no_grad()
def test_tokens_go_where_they_are_sent(both):
    experts, fused = both
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 80, generator=generator)
    # Expert 2 gets none.
    chosen = torch.stack([torch.tensor([0, 1, 3])[torch.randperm(3, generator=generator)[:2]] for _ in range(13)])
    weights = torch.rand(13, 2, generator=generator)
    expected = sum(
        weights[:, slot, None]
        * torch.stack(
            [
                torch.addmm(
                    fused.down_proj_bias[e],
                    fused._apply_gate(x[None] @ fused.gate_up_proj[e] + fused.gate_up_proj_bias[e]),
                    fused.down_proj[e],
                )[0]
                for x, e in zip(hidden, chosen[:, slot].tolist(), strict=True)
            ]
        )
        for slot in range(2)
    )
    torch.testing.assert_close(experts(hidden, chosen, weights), expected, rtol=1e-5, atol=1e-5)
    order, counts = experts.tokens_of(chosen)
    assert counts == torch.bincount(chosen.flatten(), minlength=4).tolist()
    assert counts[2] == 0
    assert torch.equal(chosen.flatten()[order], chosen.flatten().sort().values)


def test_a_copy_is_another_module(both):
    experts, _ = both
    twin = copy.deepcopy(experts)
    twin.expert(0).gate_proj.weight.data.zero_()
    assert float(experts.expert(0).gate_proj.weight.abs().sum()) > 0


def test_names():
    assert expert_of("mlp.experts.3.up_proj") == ("mlp.experts", 3, "up_proj")
    assert expert_of("mlp.up_proj") is None
    assert input_name(("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj")) == "mlp.experts.gate_proj_input"
    assert input_name(("block_sparse_moe.experts.11.down_proj",)) == "block_sparse_moe.experts.down_proj_input"
    assert input_name(("mlp.gate_proj", "mlp.up_proj")) == "mlp.gate_proj.input"


def test_a_layer_without_experts_stays_as_it_is():
    layer = nn.ModuleDict({"mlp": nn.Linear(3, 3)})
    separate_experts(layer)
    assert not any(isinstance(module, Experts) for module in layer.modules())
