"""A packed folder that is damaged, or of another version, is refused by name before anything computes with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_toy, write_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import lbllm_cli.hf

DOWN = "model.layers.1.mlp.down_proj"
INPUT = "model.layers.0.self_attn.q_proj.input"


@pytest.fixture(scope="session")
def export(export_of) -> Path:
    return export_of("llama-tied")


@pytest.fixture
def folder(export, tmp_path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "export"))


def edit(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    old = tensors.pop(name)
    if change is not None:
        tensors[name] = change(old).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{DOWN}.weight", lambda t: t[:, :1], r"down_proj.weight: expected U8 \(.*\), got U8"),
        (f"{DOWN}.weight", lambda t: t.int(), r"down_proj.weight: expected U8 .*, got I32"),
        (f"{DOWN}.levels", lambda t: t.float(), r"down_proj.levels: expected I8 .*, got F32"),
        (f"{DOWN}.levels", None, "down_proj.levels: expected I8 .*, got nothing"),
        (f"{DOWN}.scale", lambda t: t * torch.inf, "down_proj.scale holds NaN or infinity"),
        (f"{INPUT}.act_levels", lambda t: t + 120, r"act_levels: expected rows that ascend within 0\.\.127"),
        (f"{INPUT}.act_levels", lambda t: t.flip(1), r"act_levels: expected rows that ascend within 0\.\.127"),
        (f"{INPUT}.act_levels", None, "act_levels: expected U8 .*, got nothing"),
        (f"{INPUT}.act_zero", lambda t: t * 0 + 126, "act_zero: expected one of act_levels"),
        (f"{INPUT}.act_clip", lambda t: t * 0, r"act_clip: expected 6554 to 65536, got \[\[0, 0\]"),
        (f"{INPUT}.act_clip", lambda t: -t, "act_clip: expected 6554 to 65536, got"),
        (f"{INPUT}.act_clip", lambda t: t * 0 + 2**31 - 1, "act_clip: expected 6554 to 65536, got"),
        ("model.embed_tokens.weight", None, "lacks 1 tensors, first model.embed_tokens.weight"),
        ("model.norm.weight", None, "lacks 1 tensors, first model.norm.weight"),
        ("model.layers.2.input_layernorm.weight", None, "lacks 1 tensors, first model.layers.2.input_layernorm.weight"),
        ("model.norm.weight", lambda t: t[:8], r"model.norm.weight has shape \[8\], config.json says \[80\]"),
        ("model.norm.weight", lambda t: t.int(), "model.norm.weight is I32; expected float32"),
        ("model.norm.weight", lambda t: t * torch.nan, "model.norm.weight holds NaN or infinity"),
        ("model.embed_tokens.weight", lambda t: t * torch.inf, "model.embed_tokens.weight holds NaN or infinity"),
    ],
)
def test_tensors_that_the_format_has_no_meaning_for(folder, name, change, message):
    edit(folder, name, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_biases_and_heads_that_are_missing(ok, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", save_toy(tmp_path / "model", "qwen2-sliding"), tmp_path / "run", ptq={"rounds": 0})
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    for name in ("lm_head.weight", "model.layers.0.self_attn.k_proj.bias"):
        folder = Path(shutil.copytree(tmp_path / "run" / "export", tmp_path / name))
        edit(folder, name, None)
        with pytest.raises(ValueError, match=f"lacks 1 tensors, first {name}"):
            AutoModelForCausalLM.from_pretrained(folder)


def configure(folder: Path, outer: dict[str, object], **changes: object) -> None:
    """Changes config.json: outer, values of its own; changes, of its quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**config["quantization_config"], **changes}
    (folder / "config.json").write_text(json.dumps({**config, **outer}))


LAYOUT = {"bits": 4, "kv_bits": 4, "granularity": "group", "form": "knee", "kv_form": "knee", "tables": 2, "group_size": 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": {**LAYOUT, "granularity": "row"}}, "activations.granularity: input should be 'group' or 'token'"),
        ({"activations": {**LAYOUT, "form": "bent"}}, "activations.form: input should be 'knee' or 'uniform', got 'bent'"),
        ({"activations": {**LAYOUT, "kv_form": 1}}, "activations.kv_form: input should be 'knee' or 'uniform', got '1'"),
        ({"activations": {**LAYOUT, "group_size": 16}}, "activations.group_size: expected that of the weights, 32, got 16"),
        ({"activations": {**LAYOUT, "bits": 2}}, "activations.bits: input should be greater than or equal to 3, got '2'"),
        ({"activations": {**LAYOUT, "kv_bits": 40}}, "activations.kv_bits: input should be less than or equal to 8"),
        ({"activations": {**LAYOUT, "tables": True}}, "activations.tables: input should be a valid integer, got 'True'"),
        ({"activations": {**LAYOUT, "more": 1}}, "activations.more: extra inputs are not permitted"),
        ({"activations": [4]}, "activations: expected a mapping, got"),
        ({"group_size": 24}, "group_size: expected a multiple of 16 up to 4096, got 24"),
        ({"group_size": "32"}, "group_size: expected a multiple of 16"),
        ({"group_size": 0}, "group_size: expected a multiple of 16"),
        ({"linears": ["lm_head"]}, "linears: expected the linears of a block"),
        ({"linears": 5}, "linears: expected the linears of a block"),
        ({"format_version": None}, "format_version: expected 1 to 8, got None"),
        ({"format_version": 1}, "format_version: expected 2 or more where there are activations, got 1"),
    ],
    ids=range(16),
)
def test_settings_that_the_format_has_no_meaning_for(folder, lbllm, changes, message):
    configure(folder, {}, **changes)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    result = lbllm("generate", "--model", folder, "--prompt", "the", "--max-new-tokens", "1")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("layers", "message"),
    [(2, "holds .* tensors that config.json does not name, first model.layers.2"), (4, "model.layers.3.* got nothing")],
)
def test_other_numbers_of_blocks_than_are_stored(folder, layers, message):
    configure(folder, {"num_hidden_layers": layers})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def test_the_decoder_alone_is_the_one_inside_the_model(folder):
    tokens = torch.arange(12).view(2, 6)
    decoder, model = (kind.from_pretrained(folder).eval() for kind in (AutoModel, AutoModelForCausalLM))
    assert torch.equal(decoder(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    edit(folder, "model.norm.weight", None)
    with pytest.raises(ValueError, match=r"lacks 1 tensors, first norm\.weight"):
        AutoModel.from_pretrained(folder)


def test_generate_turns_the_refusal_into_one_message(folder, lbllm):
    edit(folder, f"{DOWN}.levels", None)
    result = lbllm("generate", "--model", folder, "--prompt", "the", "--max-new-tokens", "1")
    assert result.exit_code == 2
    assert f"{DOWN}.levels: expected" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_newer_format_version(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="packed format_version 9, this lbllm reads 8; update lbllm-cli"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_headers_alone_are_compared_for_an_engine_that_loads_by_itself(folder):
    """What vLLM is let near."""
    config = AutoConfig.from_pretrained(folder)
    lbllm_cli.hf.check_packed(config, [folder / "model.safetensors"])
    edit(folder, "model.layers.1.post_attention_layernorm.weight", None)
    with pytest.raises(ValueError, match=r"lacks 1 tensors, first model.layers.1.post_attention_layernorm.weight"):
        lbllm_cli.hf.check_packed(config, [folder / "model.safetensors"])


def test_a_truncated_shard(folder, lbllm):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = lbllm("generate", "--model", folder, "--prompt", "the")
    assert result.exit_code == 2
    assert "is truncated or padded" in result.stderr
