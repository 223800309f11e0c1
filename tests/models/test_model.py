"""A source model whose files and configuration disagree: as transformers reads it, or refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_toy, write_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lbllm_cli.core.errors import RunError, UsageError
from lbllm_cli.core.model_folder import resolve
from lbllm_cli.models.model import EMBEDDING, FINAL_NORM, HEAD, SourceModel, open_model
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.schema import Model

CPU = torch.device("cpu")


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors[name] = tensor
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata={"format": "pt"})


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def opened(folder: Path) -> SourceModel:
    return open_model(Model(path=str(folder)), CPU)


@pytest.mark.slow
@torch.no_grad()
def test_a_head_beside_tied_embeddings_is_used_as_transformers_uses_it(ok, toy, recipe, tmp_path):
    from lbllm_cli.pipeline.plan import prepare

    head = torch.randn(1024, 80, generator=torch.Generator().manual_seed(3)) * 0.1
    edit(toy, **{HEAD: head})
    assert torch.equal(opened(toy).head()[1].weight, head)
    run = tmp_path / "run"
    ok("ptq", "--recipe", recipe, "ptq.rounds=0")
    ok("export", "--recipe", recipe, "ptq.rounds=0")
    found = json.loads(ok("eval", "--recipe", recipe, "ptq.rounds=0", "eval.checkpoints=[base, ptq, export]", "--json").stdout)
    tokens = prepare(load_recipe(recipe, []), evaluate=True).evaluation()["novels"]
    for name, folder in (("base", toy), ("ptq", run / "export"), ("export", run / "export")):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(model.get_output_embeddings().weight, head)
        predicted = torch.log_softmax(model(tokens).logits[:, :-1].double(), -1)
        perplexity = float((-predicted.gather(-1, tokens[:, 1:, None]).mean()).exp())
        assert found[name]["perplexity"]["novels"] == pytest.approx(perplexity, rel=1e-5), name


def test_a_head_that_equals_tied_embeddings_is_the_embedding(toy):
    embedding = load_file(toy / "model.safetensors")[EMBEDDING]
    edit(toy, **{HEAD: embedding.clone()})
    model = opened(toy)
    assert model.config.tie_word_embeddings
    assert HEAD not in model.shapes
    assert model.exported_config() == json.loads((toy / "config.json").read_text())


def test_a_head_of_another_width_is_refused(toy):
    edit(toy, **{HEAD: torch.ones(1024, 8)})
    with pytest.raises(UsageError, match=r"lm_head\.weight has shape \[1024, 8\], config\.json says \[1024, 80\]"):
        opened(toy)


@pytest.mark.parametrize(("family", "name"), [("llama-tied", EMBEDDING), ("llama-tied", FINAL_NORM), ("llama-untied", HEAD)])
def test_values_outside_the_blocks_are_checked_where_a_stage_starts(lbllm, tmp_path, family, name):
    folder = save_toy(tmp_path / "model", family)
    opened(folder).check_outer()
    spoiled = load_file(folder / "model.safetensors")[name]
    spoiled.view(-1)[-1] = torch.nan
    edit(folder, **{name: spoiled})
    with pytest.raises(RunError, match=f"{name} in .* holds NaN or infinity"):
        opened(folder).check_outer()
    recipe = write_recipe(tmp_path / "r.yaml", folder, tmp_path / "run")
    result = lbllm("ptq", "--recipe", recipe)
    assert result.exit_code == 1
    assert f"{name} in" in result.stderr
    assert not list((tmp_path / "run").rglob("block_*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "holds 9 tensors that config.json does not name, first model.layers.2."),
        ({"num_hidden_layers": 4}, "lacks 9 tensors, first model.layers.3."),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 1,024, got 1,000,000,000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer, got 0"),
        ({"hidden_size": "wide"}, "hidden_size: expected a positive integer, got wide"),
        ({"hidden_act": 7}, "config.json cannot be used: "),
        ({"rope_scaling": {"type": "linear", "factor": "x"}, "rope_parameters": None}, "config.json"),
        ({"rope_parameters": {"rope_theta": float("nan"), "rope_type": "default"}}, "rotary embeddings that are not finite"),
        ({"model_type": {}}, "model_type '{}' is not supported"),
        ({"quantization_config": "4 bits" * 999}, "bits4 bi); give the full-precision model"),
        ({"layer_types": 5}, "config.json cannot be used: "),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention with a sliding_window"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types: expected full_attention"),
        ({"max_position_embeddings": -1}, "max_position_embeddings: expected a positive integer"),
        ({"text_config": "llama"}, "the configuration of the model inside (text_config, decoder) is no mapping"),
        ({"is_encoder_decoder": [1]}, "is_encoder_decoder: expected false, llama has no encoder"),
        ({"sliding_window": [4]}, "sliding_window: expected a positive integer or null, got [4]"),
    ],
    ids=range(18),
)
def test_configurations_are_refused_before_a_stage_starts(lbllm, toy, recipe, tmp_path, changes, message):
    configure(toy, **changes)
    for command in ("ptq", "validate"):
        result = lbllm(command, "--recipe", recipe)
        assert result.exit_code == 2, result.stderr
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_weight_file_without_tensors(lbllm, toy, recipe):
    (toy / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for command in ("ptq", "validate", "eval"):
        result = lbllm(command, "--recipe", recipe)
        assert result.exit_code == 2
        assert "lacks 29 tensors, first model.embed_tokens.weight" in result.stderr


def test_what_a_configuration_says_about_outputs_is_not_what_stages_read(ok, toy, recipe, tmp_path):
    run = tmp_path / "run"
    ok("ptq", "--recipe", recipe, "ptq.rounds=0", f"output.dir={tmp_path / 'plain'}")
    said = ok("generate", "--model", toy, "--prompt", "the sea", "--max-new-tokens", "2").stdout
    configure(toy, return_dict=False, output_hidden_states={"a": 1}, output_attentions=True)
    ok("ptq", "--recipe", recipe, "ptq.rounds=0")
    for block in (run / "ptq").glob("block_*.safetensors"):
        assert block.read_bytes() == (tmp_path / "plain" / "ptq" / block.name).read_bytes()
    assert ok("generate", "--model", toy, "--prompt", "the sea", "--max-new-tokens", "2").stdout == said


def test_only_the_configuration_for_a_forecast(lbllm, toy, recipe):
    (toy / "model.safetensors").unlink()
    configure(toy, num_key_value_heads=3)
    assert "num_attention_heads 4 is not a multiple of num_key_value_heads 3" in lbllm("validate", "--recipe", recipe).stderr


def test_code_of_a_folder_is_not_run_for_a_family_that_is_known(ok, toy, recipe, tmp_path):
    (toy / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    configure(toy, auto_map={"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"})
    ok("ptq", "--recipe", recipe, "ptq.rounds=0")
    ok("generate", "--model", toy, "--prompt", "the sea", "--max-new-tokens", "1")
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_not_here_yet(lbllm, recipe, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    result = lbllm("ptq", "--recipe", recipe, "model.path=nobody/nothing-here")
    assert result.exit_code == 2
    assert "model.path nobody/nothing-here: no such folder, and it cannot be fetched from the Hugging Face hub" in result.stderr
    assert "there is no such user" in lbllm("ptq", "--recipe", recipe, "model.path=~nosuchuser").stderr


def test_a_download_that_breaks_is_one_message(monkeypatch):
    """Its connection's errors are of the library below, and no OSError."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("peer closed connection without sending complete message body")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(UsageError, match=r"cannot be fetched from the Hugging Face hub .*peer closed connection"):
        resolve("nobody/nothing-here", None, weights=False)


def test_an_odd_tokenizer(lbllm, toy, recipe):
    shutil.copyfile(toy / "tokenizer.json", toy / "kept")
    for text, message in (("{}", "cannot be loaded"), ("[" * 100_000, "cannot be loaded"), ("7", "cannot be loaded")):
        (toy / "tokenizer.json").write_text(text)
        result = lbllm("validate", "--recipe", recipe)
        assert result.exit_code == 2, text[:9]
        assert f"the tokenizer {message}" in result.stderr
    shutil.move(toy / "kept", toy / "tokenizer.json")
    (toy / "tokenizer_config.json").write_text("[]")
    assert "tokenizer" in lbllm("validate", "--recipe", recipe).stderr


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama-tied", {"model_type": "bloom"}, "docs/adding.md says how to add one"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, "mlp_only_layers, decoder_sparse_step: blocks of different shapes"),
        ("gpt-oss", {"quantization_config": {"quant_method": "mxfp4"}}, "full-precision model, a copy of it in bfloat16"),
        ("qwen3-moe", {"num_local_experts": 4}, "tensors that config.json does not name, first model.layers.0.mlp.experts.4."),
        ("mixtral", {"num_local_experts": 5}, "lacks 9 tensors, first model.layers.0.mlp.experts.4.gate_proj.weight"),
        ("granitemoe", {"num_local_experts": 5}, "router.weight has shape [4, 80], config.json says [5, 80]"),
        ("gemma3", {"head_dim": 25}, "requires an even rotary dimension"),
        ("gemma3", {"layer_types": ["linear_attention"] * 3}, "config.json"),
    ],
    ids=range(8),
)
def test_other_families_are_refused_by_name(lbllm, tmp_path, family, changes, message):
    folder = save_toy(tmp_path / "model", family)
    configure(folder, **changes)
    result = lbllm("ptq", "--recipe", write_recipe(tmp_path / "r.yaml", folder, tmp_path / "run"))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_weights_outside_of_linears_are_named(monkeypatch, toy):
    from lbllm_cli.models import block

    real = block.one_block

    def odd(config, index):
        model = real(config, index)
        model.layers[0].mlp.extra = torch.nn.Parameter(torch.empty(3, 80, 7, device="meta"))
        return model

    monkeypatch.setattr(block, "one_block", odd)
    with pytest.raises(UsageError, match=r"LlamaDecoderLayer: mlp\.extra \[3, 80, 7\] are in no linear"):
        opened(toy).units  # noqa: B018 - found when it is asked for
