"""Names and shapes of files against those of modules: there and back, and against what transformers makes of a file."""

import pytest
import torch
from conftest import save_toy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lbllm_cli.core.headers import Part
from lbllm_cli.models.layout import as_stored, named_entries, stored_part
from lbllm_cli.models.model import open_model
from lbllm_cli.recipe.schema import Model

CPU = torch.device("cpu")
MIXTURES = ("qwen3-moe", "mixtral", "olmoe", "granitemoe", "gpt-oss")


@pytest.mark.parametrize("name", MIXTURES)
def test_blocks_come_back_as_they_are_stored(tmp_path, name):
    folder = save_toy(tmp_path / "model", name)
    model = open_model(Model(path=str(folder)), CPU)
    stored = load_file(folder / "model.safetensors")
    for index in range(model.blocks):
        written = model.as_stored(model.read(model.block_names(index)))
        expected = {key: value for key, value in stored.items() if key.startswith(f"model.layers.{index}.")}
        assert written.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(written[key], tensor), key


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_is_the_one_that_transformers_loads(tmp_path, name):
    folder = save_toy(tmp_path / "model", name)
    model = open_model(Model(path=str(folder)), CPU)
    layer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[1]
    fused = next(module for module in layer.modules() if hasattr(module, "gate_up_proj"))
    block = model.block(1)
    inner = fused.down_proj.shape[1 if getattr(fused, "is_transposed", False) else 2]
    for linear in block.linears:
        if ".experts." not in linear:
            continue
        number, kind = int(linear.split(".")[-2]), linear.rpartition(".")[2]
        whole = fused.down_proj[number] if kind == "down_proj" else fused.gate_up_proj[number]
        whole = whole.T if getattr(fused, "is_transposed", False) else whole
        if kind != "down_proj":
            first = kind == "gate_proj"
            halves = (whole[:inner], whole[inner:]) if getattr(fused, "is_concatenated", True) else (whole[::2], whole[1::2])
            whole = halves[0 if first else 1]
        assert torch.equal(block.linear(linear).weight, whole), linear


def test_parts_of_one_tensor():
    whole = torch.arange(2 * 3 * 8).view(2, 3, 8)
    part = Part("x", index=1, transposed=True, half=1, interleaved=True)
    assert part.shape((2, 3, 8)) == (4, 3)
    assert torch.equal(part.of(whole[1]), whole[1].T[1::2])
    assert torch.equal(Part("x", half=1).of(whole[0, 0]), whole[0, 0, 4:])


def test_an_expert_that_files_lack_is_named(tmp_path):
    folder = save_toy(tmp_path / "model", "mixtral")
    model = open_model(Model(path=str(folder)), CPU)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    part = stored_part(model.family, name)
    assert part == Part("model.layers.0.block_sparse_moe.experts.2.w3.weight")
    from lbllm_cli.core.model_folder import read_folder

    entries = read_folder(folder)
    del entries[part.name]
    assert name not in named_entries(model.family, entries, model.shapes)
    assert as_stored(model.family, {name: torch.ones(1)}, 4) == {part.name: torch.ones(1)}
