"""`lbllm generate`: what it writes; and folders and prompts that cannot be used, one message each before a weight is read."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TOY, save_toy
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lbllm_cli.cli.app import app
from lbllm_cli.core.errors import RunError, UsageError
from lbllm_cli.models.config import positions
from lbllm_cli.runtime.backend import choose_device

NORM = "model.norm.weight"
CONFIG, SETTINGS = "config.json", "generation_config.json"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return save_toy(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture
def folder(toy, tmp_path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "model"))


@pytest.fixture
def refused(lbllm):
    """The one message of a refused `lbllm generate`."""

    def run(model, *arguments, prompt="the sea", code=2, tokens="2"):
        result = lbllm("generate", "--model", model, "--prompt", prompt, "--max-new-tokens", tokens, *arguments)
        assert result.exit_code == code, result.stdout + result.stderr
        assert result.stderr.count("lbllm: ") == 1
        assert "Traceback" not in result.stderr
        assert not result.stdout
        return result.stderr

    return run


def edit(folder: Path, **changes) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, change in changes.items():
        if change is None:
            tensors.pop(name)
        else:
            tensors[name] = change(tensors.get(name)).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def rewrite(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.embed_tokens.weight": None}, "lacks 1 tensors, first model.embed_tokens.weight"),
        ({NORM: None}, f"lacks 1 tensors, first {NORM}"),
        ({NORM: lambda t: t * torch.nan}, f"{NORM} holds NaN or infinity"),
        ({"model.embed_tokens.weight": lambda t: t / 0}, "model.embed_tokens.weight holds NaN or infinity"),
        ({NORM: lambda t: t[:3]}, f"{NORM} has shape [3], config.json says [80]"),
        ({NORM: lambda t: t.int()}, f"{NORM} is I32; expected float32, bfloat16 or float16"),
        ({"model.layers.0.self_attn.q_proj.bias": lambda _: torch.ones(80)}, "that config.json does not name, first"),
    ],
    ids=["embedding", "norm", "NaN", "infinity", "shape", "dtype", "extra"],
)
def test_tensors_that_are_not_those_of_the_configuration(folder, refused, changes, message):
    edit(folder, **changes)
    assert message in refused(folder)


def test_a_weight_file_without_tensors(folder, refused):
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert "lacks 29 tensors, first model.embed_tokens.weight" in refused(folder)


def test_a_family_of_which_only_transformers_knows_the_names(tmp_path, refused, ok):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=1024, n_positions=32)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOY / name, folder / name)
    ok("generate", "--model", folder, "--prompt", "the sea", "--max-new-tokens", "2")
    edit(folder, **{"transformer.h.0.ln_1.weight": None})
    assert "lacks 1 tensors, first transformer.h.0.ln_1.weight" in refused(folder)
    rewrite(folder / CONFIG, n_layer=10**9)
    assert "n_layer: expected at most 1,024" in refused(folder)


def test_frequencies_of_old_checkpoints_and_an_equal_head_are_no_reason(folder, ok):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": lambda _: torch.ones(10) for i in range(3)}
    edit(folder, **frequencies, **{"lm_head.weight": lambda _: embedding.clone()})
    ok("generate", "--model", folder, "--prompt", "the sea", "--max-new-tokens", "2")


BAD_CONFIGS = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 1,024"),
    ({"num_hidden_layers": 2}, "holds 9 tensors that config.json does not name, first model.layers.2."),
    ({"num_hidden_layers": 4}, "lacks 9 tensors, first model.layers.3."),
    ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer, got 0"),
    ({"hidden_size": -1}, "hidden_size: expected a positive integer, got -1"),
    ({"hidden_size": 10**30}, "hidden_size: expected at most"),
    ({"vocab_size": "many"}, "vocab_size: expected a positive integer, got many"),
    ({"head_dim": 1.5}, "head_dim: expected a positive integer"),
    ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"attention_bias": "yes"}, "config.json cannot be used: "),
    ({"hidden_act": "sigmoidal"}, "config.json cannot be used: "),
    ({"rope_parameters": {"rope_theta": -1.0, "rope_type": "default"}}, "rotary embeddings that are not finite"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "config.json"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "none"}}, "config.json cannot be used: "),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps: expected a number from 0, got -1.0"),
    ({"layer_types": ["full_attention"] * 2}, "config.json cannot be used: "),
    ({"dtype": "float99"}, "config.json cannot be used: "),
    ({"pad_token_id": 10**9}, "config.json cannot be used: "),
    ({"model_type": ["llama"]}, "model_type: expected the name of a family"),
    ({"quantization_config": 5}, "quantization_config: expected a mapping, got int"),
    ({"quantization_config": {"quant_method": "nobody"}}, "quant_method: .* knows no 'nobody'"),
    ({"auto_map": 5}, "config.json cannot be used: "),
    ({"a": json.loads("[" * 100 + "]" * 100)}, "nested more than 32 levels deep"),
    ({"per_layer_config": {"0": {"intermediate_size": 16}}}, "blocks of different shapes are not supported"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=range(len(BAD_CONFIGS)))
def test_configurations_that_nothing_can_be_computed_with(folder, refused, changes, message):
    rewrite(folder / CONFIG, **changes)
    began = time.monotonic()
    assert re.search(message.replace("[", r"\["), refused(folder))
    assert time.monotonic() - began < 60  # of a model of these sizes it would be minutes, or the memory's end


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "cannot be read as JSON"), ("[" * 100_000, "nested too deeply"), ("7", "expected a JSON object, got int")],
    ids=range(3),
)
def test_a_configuration_that_is_none(folder, refused, text, message):
    (folder / CONFIG).write_text(text)
    assert message in refused(folder)


def test_generation_settings(folder, refused, ok):
    command = ("generate", "--model", folder, "--prompt", "the sea", "--max-new-tokens", "2")
    # As old models have it, which transformers refuses to save, and what is for other uses than a stream.
    rewrite(folder / SETTINGS, temperature=0.6, top_p=0.9, num_beams=4, max_length=3)
    ok(*command)
    for changes, message in (
        ({"top_p": "high"}, "generation_config.json: top_p: expected a number from 0 to 1, got high"),
        ({"top_p": 0.9, "top_k": -5}, "top_k: expected a number from 0"),
        ({"top_k": 5, "repetition_penalty": 0.0}, "repetition_penalty: expected a number"),
        ({"repetition_penalty": 1.0, "eos_token_id": {"a": 1}}, "eos_token_id: expected a token or several"),
    ):
        rewrite(folder / SETTINGS, **changes)
        assert message in refused(folder)
    (folder / SETTINGS).write_text("[]")
    assert "expected a JSON object, got list" in refused(folder)


def test_prompts_beyond_the_positions(folder, refused, ok):
    words = "the sea " * 200
    assert re.search(r"--prompt has \d{3} tokens, the model has 128 positions; shorten it", refused(folder, prompt=words))
    assert "the model 128 positions; give at most 12" in refused(folder, tokens="500")
    result = ok("generate", "--model", folder, "--prompt", "the sea")
    assert "prefill" in result.stderr  # without a number, as many as fit


def test_positions_of_stretched_rotary_embeddings():
    from transformers import AutoConfig

    assert positions(AutoConfig.for_model("llama", max_position_embeddings=64)) == 64
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    assert positions(AutoConfig.for_model("llama", max_position_embeddings=64, rope_parameters=rope)) == 256
    assert positions(AutoConfig.for_model("mamba")) is None


def test_prompts_that_are_no_text(folder, refused):
    assert "--prompt is not UTF-8 text" in refused(folder, prompt=b"caf\xe9".decode("utf-8", "surrogateescape"))


def test_tokenizers_that_are_none(folder, refused):
    (folder / "tokenizer.json").write_bytes(bytes(range(256)) * 20)
    assert "the tokenizer cannot be loaded" in refused(folder)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(folder)


def test_a_tokenizer_of_another_model(tmp_path, refused):
    assert "for --prompt, the model has 16; copy the model's own tokenizer" in refused(save_toy(tmp_path / "m", vocab_size=16))
    rewrite(tmp_path / "m" / "tokenizer_config.json", model_max_length="x")
    assert "model_max_length" in refused(tmp_path / "m")


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", "{{ messages[0].content + 1 }}"])
def test_chat_templates_that_fail(folder, refused, template):
    (folder / "chat_template.jinja").write_text(template)
    assert "--prompt: the tokenizer's chat template cannot render" in refused(folder)


def test_a_chat_template_is_applied_once(folder, ok):
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    command = ("generate", "--model", folder, "--max-new-tokens", "4", "--prompt")
    assert ok(*command, "the sea").stdout == ok(*command, "<|endoftext|>the sea", "--raw").stdout


@pytest.mark.parametrize("name", [CONFIG, "model.safetensors", "tokenizer.json", SETTINGS, "special_tokens_map.json"])
def test_pipes_are_refused_and_not_waited_for(folder, refused, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name} is a pipe; expected a file" in refused(folder)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("foo", "--device foo: expected auto, cpu, cuda or cuda:N"),
        ("cuda:99", "--device cuda:99: this torch sees"),
        ("", "expected auto"),
    ],
)
def test_devices(folder, refused, device, message):
    assert message in refused(folder, "--device", device)
    with pytest.raises(UsageError, match=r"runtime\.device"):
        choose_device(device)


def test_gpus_beyond_the_last(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match=r"runtime.device cuda:2: this torch sees 2 GPUs, the last is cuda:1"):
        choose_device("cuda:2")


def test_models_that_are_no_folder(folder, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "is not a folder" in refused(folder / CONFIG)
    assert "there is no such user" in refused("~nosuchuser")
    assert "is not a path" in refused("x" * 5000)
    message = refused("nobody/nothing-here")
    assert "--model nobody/nothing-here: no such folder, and it cannot be fetched from the Hugging Face hub" in message
    assert "run once with a network" in message


def test_numbers_out_of_range(folder, lbllm):
    for option, value in (("--temperature", "nan"), ("--seed", str(2**63)), ("--max-new-tokens", "0")):
        result = lbllm("generate", "--model", folder, "--prompt", "x", option, value)
        assert result.exit_code == 2, option
        assert "Traceback" not in result.stderr


def code_of_its_own(folder: Path, trace: Path) -> None:
    """A folder that brings its model's code, which leaves a trace when it runs."""
    (folder / "mine.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    rewrite(folder / CONFIG, model_type="mine", auto_map={"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"})


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(folder, lbllm, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code_of_its_own(folder, tmp_path / "ran")
    command = ["generate", "--model", str(folder), "--prompt", "the sea", "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, command, input="y\ny\ny\n", catch_exceptions=False)
    assert result.exit_code == 2
    assert "it names code of its own (auto_map), which runs only with --trust-remote-code" in result.stderr
    assert "[y/N]" not in result.output
    assert not (tmp_path / "ran").exists()
    result = lbllm(*command, "--trust-remote-code")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "ran").exists()


def test_predictions_that_are_not_finite_end_the_text(folder):
    from lbllm_cli.models.prompts import Request
    from lbllm_cli.models.streaming import stream_text

    # Finite weights whose products are not.
    edit(folder, **{NORM: lambda t: torch.full_like(t, 3e38)})
    with pytest.raises(RunError, match="predictions after 4 tokens are not finite"):
        list(stream_text(folder, Request("the sea", True, 2), torch.device("cpu"), print))


def test_a_hub_id_without_a_network_is_refused_in_time(tmp_path):
    code = "from lbllm_cli.cli.app import app; app()"
    settings = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    settings |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", code, "generate", "--model", "org/name", "--prompt", "x"]
    result = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2, result.stderr
    assert "--model org/name: no such folder, and it cannot be fetched from the Hugging Face hub" in result.stderr


def test_generate_is_deterministic_at_temperature_zero(ok, recipe, tmp_path):
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    command = ("generate", "--model", tmp_path / "run" / "export", "--prompt", "the", "--max-new-tokens", "6")
    assert ok(*command).stdout == ok(*command).stdout
    assert re.search(r"prefill \d+ tokens, [\d.]+ tokens/s; decode 5 tokens, [\d.]+ tokens/s, \d+ threads", ok(*command).stderr)
    assert ok(*command, "--temperature", "1", "--seed", "1").stdout == ok(*command, "--temperature", "1", "--seed", "1").stdout


def test_generate_without_a_token_to_begin_with(ok, lbllm, recipe, tmp_path):
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    result = lbllm("generate", "--model", tmp_path / "run" / "export", "--raw", "--prompt", "")
    assert result.exit_code == 2
    assert "--prompt is empty" in result.stderr


def test_generate_names_what_is_wrong_with_its_folder(lbllm, tmp_path, folder):
    assert "is not a folder" in lbllm("generate", "--model", tmp_path / "none", "--prompt", "x").stderr
    (folder / "model.safetensors").unlink()
    result = lbllm("generate", "--model", folder, "--prompt", "x")
    assert result.exit_code == 2
    assert "has no weights" in result.stderr
