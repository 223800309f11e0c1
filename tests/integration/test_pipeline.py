"""Recipe to exported model, for every family; what is evaluated is what is stored is what is exported."""

import json

import pytest
import torch
from conftest import FAMILIES, save_toy, write_recipe
from stages import logits_of, stage_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import lbllm_cli.hf  # noqa: F401 - registers the packed format
from lbllm_cli.data.sources import builtin_records

# Kernels add in another order than torch; here logits are compared bit for bit.
pytestmark = pytest.mark.usefixtures("in_torch")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_through_all_commands(name, tmp_path, ok):
    folder = save_toy(tmp_path / "model", name, shard="100KB")
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, run)
    ok("ptq", "--recipe", recipe)
    assert "up to date" in ok("ptq", "--recipe", recipe).stderr
    results = json.loads(ok("eval", "--recipe", recipe, "--json").stdout)
    assert json.loads((run / "eval" / "results.json").read_text()) == results
    assert list(results) == ["base", "ptq"]

    staged = stage_model(folder, run)
    expected = logits_of(staged)
    assert (expected - logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))).abs().max() > 0.01
    # Evaluation on the whole model in memory, by transformers alone.
    text = next(builtin_records("evaluation", "novels"))["text"]
    tokens = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"][:128]
    rows = torch.tensor(tokens).view(4, 32)
    with torch.no_grad():
        loss = cross_entropy(staged(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert results["ptq"]["perplexity"]["novels"] == pytest.approx(float(loss.exp()), rel=2e-5)  # measured 4e-7

    ok("export", "--recipe", recipe)
    packed = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    torch.testing.assert_close(logits_of(packed), expected, atol=0, rtol=0)
    exported = sum(file.stat().st_size for file in (run / "export").glob("*.safetensors"))
    assert results["ptq"]["bytes"] == pytest.approx(exported, rel=0.2)  # headers of many small files

    ok("export", "--recipe", recipe, "export.format=dense")
    dense = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    torch.testing.assert_close(logits_of(dense), expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_blocks_with_streams_on_disk(dtype, tmp_path, ok, recipe):
    in_float32 = json.loads(ok("eval", "--recipe", recipe, "--json").stdout)["base"]["perplexity"]["novels"]
    options = (f"model.dtype={dtype}", "runtime.streams=disk")
    ok("ptq", "--recipe", recipe, *options)
    results = json.loads(ok("eval", "--recipe", recipe, *options, "--json").stdout)
    assert results["base"]["perplexity"]["novels"] == pytest.approx(in_float32, rel=0.002)  # measured 1.9e-4, 4.0e-5
    assert results["ptq"]["perplexity"]["novels"] > 0
