"""Exports in `compressed-tensors`: what transformers makes of them without lbllm equals the checkpoint."""

import json
import shutil

import pytest
import torch
from conftest import TOY, save_toy, write_recipe
from safetensors.torch import load_file
from stages import logits_of, refused, stage_model
from transformers import AutoModelForCausalLM

from lbllm_cli.export.formats.compressed_tensors import words
from lbllm_cli.format.weights import PackedWeight

# Kernels add in another order than torch; here logits are compared bit for bit.
pytestmark = pytest.mark.usefixtures("in_torch")
FORM = "export.format=compressed-tensors"


@pytest.fixture
def exported(ok, tmp_path):
    """exported(family, **changes of the toy): source and export of its ptq stage."""

    def run(name: str = "llama-tied", **changes):
        source = save_toy(tmp_path / "model", name, **changes)
        recipe = write_recipe(tmp_path / "recipe.yaml", source, tmp_path / "run")
        ok("ptq", "--recipe", recipe)
        assert "weights are exact where they are loaded in float32" in ok("export", "--recipe", recipe, FORM).stderr
        return source, tmp_path / "run" / "export"

    return run


@pytest.mark.parametrize("name", ["llama-tied", "phi3", "gemma3", "glm4"])
def test_stock_transformers_computes_what_the_checkpoint_does(exported, tmp_path, name):
    source, export = exported(name)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model), logits_of(stage_model(source, tmp_path / "run")), atol=0, rtol=0)


def test_weights_of_a_bfloat16_model_are_exact_in_float32_and_rounded_in_16_bits(exported, tmp_path):
    _, export = exported(dtype=torch.bfloat16)
    stored = load_file(tmp_path / "run" / "ptq" / "block_001.safetensors")
    worst = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(export, dtype=dtype)
        logits_of(model)  # weights are decoded in the first pass
        found = dict(model.named_parameters())
        worst[dtype] = 0.0
        for owner in PackedWeight.owners(stored):
            weight = found[f"{owner}.weight"].float()
            wanted = PackedWeight.from_tensors(stored, owner, weight.shape[1]).values()
            worst[dtype] = max(worst[dtype], float(((weight - wanted).abs() / wanted.abs().clamp(min=1e-9)).max()))
    # Measured: 0, 0.00049, 0.0073.
    assert worst[torch.float32] == 0
    assert 0 < worst[torch.float16] <= 2**-11
    assert 0 < worst[torch.bfloat16] <= 2**-7


def test_rows_of_other_widths_have_groups_that_divide_them(exported):
    """Inputs of 80 in groups of 32: three of ours, the last of 16, are five of 16."""
    _, export = exported(intermediate_size=128)
    settings = json.loads((export / "config.json").read_text())["quantization_config"]
    sizes = {group["weights"]["group_size"]: group["targets"] for group in settings["config_groups"].values()}
    assert sizes == {16: sizes[16], 32: [r"re:.*layers\.\d+\.mlp\.down_proj$"]}
    tensors = load_file(export / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (80, 4)
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].shape == (128, 5)
    assert not [name for name in tensors if name.endswith("_proj.weight")]


@pytest.mark.parametrize("width", [1, 3, 4, 7, 16])
def test_words_hold_four_levels_each(width):
    levels = torch.randint(-127, 128, (3, width), dtype=torch.int8, generator=torch.Generator().manual_seed(width))
    found = words(levels)
    assert found.shape == (3, -(-width // 4))
    for row in range(3):
        for column in range(width):
            byte = (int(found[row, column // 4]) >> 8 * (column % 4)) & 0xFF
            assert byte - 128 == levels[row, column]


def test_its_bits_are_counted_and_it_is_measured_and_generates(ok, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", TOY, tmp_path / "run")
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe, FORM)
    found = json.loads(ok("eval", "--recipe", recipe, "eval.checkpoints=[base, ptq, export]", "--json").stdout)
    tensors = load_file(tmp_path / "run" / "export" / "model.safetensors")
    parts = [tensor for name, tensor in tensors.items() if name.rpartition(".")[2].startswith("weight_")]
    weights = sum(int(tensor.prod()) for name, tensor in tensors.items() if name.endswith("weight_shape"))
    assert found["export"]["bits_per_weight"] == pytest.approx(8 * sum(t.nbytes for t in parts) / weights, abs=1e-3)
    assert found["export"]["perplexity"] == pytest.approx(found["ptq"]["perplexity"], rel=1e-5)
    export = tmp_path / "run" / "export"
    assert len(ok("generate", "--model", export, "--prompt", "The sea", "--max-new-tokens", "8").stdout) > 8


def test_quantizers_of_activations_are_left_out_and_that_is_said(ok, finished, tmp_path):
    toy, output = finished("ptq", "distill", "act-calib")
    shutil.copytree(output, tmp_path / "run")
    said = ok("export", "--recipe", write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run"), FORM).stderr
    assert "in 16 bits their reader rounds levels times scales; quantizers of activations are left out" in said


def test_experts_are_refused_before_anything_is_written(ok, lbllm, tmp_path):
    source = save_toy(tmp_path / "model", "mixtral")
    recipe = write_recipe(tmp_path / "recipe.yaml", source, tmp_path / "run", ptq={"rounds": 0})
    ok("ptq", "--recipe", recipe)
    message = refused(lbllm, tmp_path / "run", "export", "--recipe", recipe, FORM)
    assert "export.format: compressed-tensors has no form for experts (mixtral); set it to packed or dense" in message
