"""Exported folders: they stand alone, load as they are or fail loudly, and are counted from their files."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import save_toy, write_recipe
from safetensors.torch import load_file
from stages import logits_of, stage_model
from transformers import AutoModelForCausalLM

import lbllm_cli.hf  # noqa: F401 - registers the packed format
from lbllm_cli.format.weights import PackedWeight

# Kernels add in another order than torch; here logits are compared bit for bit.
pytestmark = pytest.mark.usefixtures("in_torch")


def test_export_stands_alone_and_keeps_the_source_files(tmp_path, ok, toy, recipe):
    (toy / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')  # invalid with do_sample unset
    (toy / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    kept = {f.name: f.read_bytes() for f in toy.iterdir() if f.suffix != ".safetensors" and f.name != "config.json"}
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    export = tmp_path / "run" / "export"
    expected = logits_of(stage_model(toy, tmp_path / "run"))
    shutil.rmtree(toy)
    shutil.rmtree(tmp_path / "run" / "ptq")
    for name, content in kept.items():
        assert (export / name).read_bytes() == content, name
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(export)), expected, atol=0, rtol=0)
    command = ("generate", "--model", export, "--prompt", "hello", "--max-new-tokens", "8")
    assert ok(*command).stdout != ok(*command, "--raw").stdout  # with and without the chat template


def test_an_export_is_up_to_date_with_its_tokenizer_too(tmp_path, ok, toy, recipe):
    (toy / "generation_config.json").write_text('{"eos_token_id": 1}')
    ok("ptq", "--recipe", recipe)
    command = ("export", "--recipe", recipe)
    ok(*command)
    assert "up to date" in ok(*command).stderr
    (toy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "up to date" not in ok(*command).stderr
    assert "up to date" in ok(*command).stderr
    export = tmp_path / "run" / "export"
    # The record of a version that did not say which tokenizer it was.
    record = json.loads((export / "lbllm_export.json").read_text())
    del record["metadata"]
    (export / "lbllm_export.json").write_text(json.dumps(record))
    assert "up to date" in ok(*command).stderr
    (export / "tokenizer.json").unlink()
    assert "up to date" not in ok(*command).stderr
    assert (export / "tokenizer.json").exists()


def test_a_tokenizer_with_code_of_its_own_goes_into_the_export(tmp_path, ok, lbllm, toy, recipe, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    settings = json.loads((toy / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}, "tokenizer_class": "MineTokenizer"}
    (toy / "tokenizer_config.json").write_text(json.dumps(settings))
    (toy / "tokenization_mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass MineTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    trusted = "model.trust_remote_code=true"
    ok("ptq", "--recipe", recipe, trusted)
    ok("export", "--recipe", recipe, trusted)
    shutil.rmtree(tmp_path / "modules")
    command = ("generate", "--model", tmp_path / "run" / "export", "--prompt", "the sea", "--max-new-tokens", "2")
    assert lbllm(*command).exit_code == 2
    assert lbllm(*command, "--trust-remote-code").exit_code == 0
    ok("export", "--recipe", recipe, trusted, "--force")  # the folder is still lbllm's


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_a_dequantized_mixture_is_saved_so_that_it_loads_or_not_at_all(export_of, tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(export_of(family), dtype=torch.float32)
    model.dequantize()
    if family == "mixtral":
        with pytest.raises(ValueError, match=r"export\.format=dense"):
            model.save_pretrained(tmp_path / "again")
        assert not (tmp_path / "again").exists()
        return
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-5, rtol=0)


def test_loading_without_the_plugin_fails_loudly(tmp_path, ok, recipe):
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'run' / 'export')!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "size mismatch" in result.stderr or "mismatch" in result.stderr


def test_sharded_export_has_an_index_and_the_same_logits(tmp_path, ok, toy, recipe):
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe, "export.shard_gb=0.00003")
    export = tmp_path / "run" / "export"
    index = json.loads((export / "model.safetensors.index.json").read_text())
    shards = {f.name: load_file(f) for f in export.glob("*.safetensors")}
    assert len(shards) > 3
    assert {name: file for file, tensors in shards.items() for name in tensors} == index["weight_map"]
    expected = logits_of(stage_model(toy, tmp_path / "run"))
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(export)), expected, atol=0, rtol=0)


def test_all_files_of_an_export_can_be_read_by_whom_the_umask_lets(tmp_path, ok, recipe):
    ok("ptq", "--recipe", recipe, "ptq.rounds=0")
    usual = os.umask(0o022)
    try:
        for form in ("packed", "dense"):
            ok("export", "--recipe", recipe, "ptq.rounds=0", f"export.format={form}")
            assert {file.stat().st_mode & 0o777 for file in (tmp_path / "run" / "export").iterdir()} == {0o644}
    finally:
        os.umask(usual)


def test_packed_model_survives_casts_saving_and_dequantizing(tmp_path, ok, recipe):
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    expected = logits_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith((".scale", ".levels"))}
    model.to(torch.bfloat16)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected, atol=0, rtol=0)
    again.dequantize()
    torch.testing.assert_close(logits_of(again), expected, atol=0, rtol=0)


def test_bfloat16_source_dense_export_rounds_once(tmp_path, ok):
    folder = save_toy(tmp_path / "model", dtype=torch.bfloat16)
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, tmp_path / "run")
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe, "export.format=dense")
    dense = load_file(tmp_path / "run" / "export" / "model.safetensors")
    stored = load_file(tmp_path / "run" / "ptq" / "block_001.safetensors")
    owners = PackedWeight.owners(stored)
    assert len(owners) == 7
    for name in owners:
        weight = PackedWeight.from_tensors(stored, name, dense[f"{name}.weight"].shape[1]).values()
        assert torch.equal(dense[f"{name}.weight"], weight.bfloat16()), name


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16)])
def test_bits_are_those_that_a_model_is_computed_in(tmp_path, recipe, dtype, bits):
    from lbllm_cli.evaluation.sizes import measure_sizes
    from lbllm_cli.pipeline.plan import prepare
    from lbllm_cli.recipe.load import load_recipe

    model = prepare(load_recipe(recipe, [f"model.dtype={dtype}"])).model
    sizes = measure_sizes(model, None, 0)
    assert (sizes.bits_per_weight, sizes.bits_per_parameter) == (bits, bits)
    # Codes, and what is outside of them: those have what they have.
    codes = {name: replace(model.entries[name], dtype="U8", shape=(7,)) for name in model.binarized_names}
    found = measure_sizes(model, codes, 0)
    assert found.bits_per_weight == 8 * 7 * len(codes) / model.binarized_parameters
    others = model.count([name for name in model.shapes if name not in codes])
    assert found.bits_per_parameter == (8 * 7 * len(codes) + bits * others) / model.count(list(model.shapes))
    assert found.bytes == 4 * others, "files are in float32"


def test_sizes_are_counted_from_the_files(tmp_path, ok):
    folder = save_toy(tmp_path / "model", dtype=torch.bfloat16, hidden_size=256, intermediate_size=384, head_dim=64)
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, tmp_path / "run", ptq={"group_size": 128, "rounds": 0})
    ok("ptq", "--recipe", recipe)
    results = json.loads(ok("eval", "--recipe", recipe, "--json").stdout)
    assert results["base"]["bits_per_weight"] == results["base"]["bits_per_parameter"] == 16
    assert results["base"]["bytes"] == (folder / "model.safetensors").stat().st_size
    assert results["ptq"]["bits_per_weight"] == 2.375
    ok("export", "--recipe", recipe)
    weights = load_file(tmp_path / "run" / "export" / "model.safetensors")
    parameters = sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    bits = 8 * sum(t.numel() * t.element_size() for t in weights.values()) / parameters
    assert results["ptq"]["bits_per_parameter"] == pytest.approx(bits, abs=1e-4)
