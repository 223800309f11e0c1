"""Each mistake: one message with what mends it, exit code 2, nothing written."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import save_toy, write_recipe
from safetensors.torch import load_file, save_file
from stages import refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "not valid YAML"),
        ("- a", "expected a mapping"),
        ("model: {path: x}\nmodel: {path: y}\noutput: {dir: z}", "line 2: duplicate key `model`"),
        ("model: {path: x}\noutput: {dir: y}\nptq: {groupsize: 64}", "ptq.groupsize: unknown key; did you mean `group_size`?"),
        ("model: {path: x}\noutput: {dir: y}\nptq: {group_size: 100}", "ptq.group_size: input should be a multiple of 16"),
        ("model: {path: x}\noutput: {dir: y}\nptq: {group_size: many}", "ptq.group_size: input should be a valid integer"),
        ("model: {}\noutput: {dir: y}", "model.path: missing"),
    ],
)
def test_recipes(lbllm, tmp_path, text, expected):
    (tmp_path / "r.yaml").write_text(text)
    assert expected in refused(lbllm, tmp_path / "y", "ptq", "--recipe", tmp_path / "r.yaml")


def test_missing_recipe(lbllm, tmp_path):
    assert "does not exist" in refused(lbllm, tmp_path / "run", "ptq", "--recipe", tmp_path / "none.yaml")


def _without_weights(toy: Path) -> None:
    (toy / "model.safetensors").unlink()


def _truncated(toy: Path) -> None:
    file = toy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _corrupt_header(toy: Path) -> None:
    file = toy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"x" * 100 + file.read_bytes()[108:])


def _missing_tensor(toy: Path) -> None:
    tensors = load_file(toy / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, toy / "model.safetensors")


def _wrong_shape(toy: Path) -> None:
    tensors = load_file(toy / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, toy / "model.safetensors")


def _without_tokenizer(toy: Path) -> None:
    (toy / "tokenizer.json").unlink()


def _config(toy: Path, **changes) -> None:
    config = json.loads((toy / "config.json").read_text())
    (toy / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_without_weights, "has no weights"),
        (_truncated, "truncated"),
        (_corrupt_header, "corrupt safetensors header"),
        (_missing_tensor, "lacks 1 tensors, first model.layers.1.mlp.up_proj.weight"),
        (_wrong_shape, "model.norm.weight has shape [3], config.json says [80]"),
        (_without_tokenizer, "has no tokenizer"),
        (lambda toy: (toy / "config.json").unlink(), "has no config.json"),
        (lambda toy: (toy / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda toy: _config(toy, model_type="gpt2"), "Conv1D"),
        (lambda toy: _config(toy, model_type="mixtral", num_local_experts=8), "lacks 75 tensors, first model.layers.0.mlp.gate"),
        (lambda toy: _config(toy, model_type="bloom"), "model_type 'bloom' is not supported; supported: gemma2"),
        (lambda toy: _config(toy, quantization_config={"quant_method": "gptq"}), "already quantized (gptq)"),
    ],
)
def test_models(lbllm, tmp_path, toy, recipe, spoil, expected):
    spoil(toy)
    assert expected in refused(lbllm, tmp_path / "run", "ptq", "--recipe", recipe)


def test_missing_shard(lbllm, tmp_path, ok):
    folder = save_toy(tmp_path / "sharded", shard="100KB")
    recipe = write_recipe(tmp_path / "r.yaml", folder, tmp_path / "run")
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert gone.name in refused(lbllm, tmp_path / "run", "ptq", "--recipe", recipe)


def test_other_layers_are_refused_from_real_configs(lbllm, tmp_path):
    from transformers import DeepseekV3Config, GPT2Config

    for config, reason in ((GPT2Config(), "Conv1D"), (DeepseekV3Config(), "docs/adding.md says how to add one")):
        folder = tmp_path / config.model_type
        config.save_pretrained(folder)
        recipe = write_recipe(tmp_path / "r.yaml", folder, tmp_path / "run")
        assert reason in refused(lbllm, tmp_path / "run", "validate", "--recipe", recipe)


def test_too_short_text_names_found_and_needed(lbllm, tmp_path, recipe):
    (tmp_path / "short.txt").write_text("A short text. " * 10)
    message = refused(lbllm, tmp_path / "run", "ptq", "--recipe", recipe, f"data.calibration.source={tmp_path / 'short.txt'}")
    assert "192 are needed (6 sequences x 32)" in message
    message = refused(lbllm, tmp_path / "run", "ptq", "--recipe", recipe, "data.calibration.source=no/such/file.txt")
    assert "no such file" in message
    message = refused(lbllm, tmp_path / "run", "ptq", "--recipe", recipe, "data.calibration.length=4096")
    assert "the model has 128 positions" in message


def test_several_mistakes_come_at_once(lbllm, tmp_path, toy, recipe):
    _without_tokenizer(toy)
    message = refused(lbllm, tmp_path / "run", "ptq", "--recipe", recipe, "data.calibration.source=builtin:poems")
    assert "has no tokenizer" in message
    assert "no such bundled text" in message


def test_output_folder_of_another_recipe(lbllm, ok, tmp_path, recipe):
    ok("ptq", "--recipe", recipe)
    message = refused(lbllm, tmp_path / "run", "ptq", "--recipe", recipe, "ptq.damping=0.1", "ptq.rounds=0")
    assert "ptq.damping: 0.01 -> 0.1" in message
    assert "ptq.rounds: 1 -> 0" in message
    assert "ptq.group_size" not in message
    other = save_toy(tmp_path / "other", vocab_size=1024, num_hidden_layers=2)
    message = refused(lbllm, tmp_path / "run", "eval", "--recipe", recipe, f"model.path={other}")
    assert "was made from another model" in message


def test_output_that_cannot_be_written(lbllm, tmp_path, recipe):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(lbllm, tmp_path / "run", "ptq", "--recipe", recipe, f"output.dir={tmp_path / 'file'}")
    below = tmp_path / "file" / "below"
    assert "cannot be written" in refused(lbllm, tmp_path / "run", "ptq", "--recipe", recipe, f"output.dir={below}")
    model = tmp_path / "model"
    assert "the model's own folder" in refused(lbllm, tmp_path / "run", "ptq", "--recipe", recipe, f"output.dir={model}")


def test_disk_too_small(lbllm, tmp_path, recipe, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1000))
    for command in ("ptq", "validate"):
        assert "GiB of disk" in refused(lbllm, tmp_path / "run", command, "--recipe", recipe)


def test_full_disk_in_the_middle_is_resumable(lbllm, ok, tmp_path, recipe, monkeypatch):
    from lbllm_cli.pipeline import stage_writer

    real, calls = stage_writer.save_file, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", "block")
        real(*arguments, **options)

    monkeypatch.setattr(stage_writer, "save_file", full)
    result = lbllm("ptq", "--recipe", recipe)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert "resuming after block 1 of 3" in ok("ptq", "--recipe", recipe).stderr


def test_a_full_precision_stream_that_is_not_finite_is_named(lbllm, tmp_path, recipe, monkeypatch):
    from lbllm_cli.ptq.moments import InputMoments

    real = InputMoments.mean_drift
    monkeypatch.setattr(InputMoments, "mean_drift", lambda self: real(self) * float("nan"))
    result = lbllm("ptq", "--recipe", recipe)
    assert result.exit_code == 1
    assert "block 0, self_attn.q_proj: inputs of the full-precision block hold NaN" in result.stderr
    assert not list((tmp_path / "run" / "ptq.partial").glob("block_*"))


def test_changed_stage_files(lbllm, ok, tmp_path, recipe):
    ok("ptq", "--recipe", recipe)
    file = tmp_path / "run" / "ptq" / "block_001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for command in ("ptq", "eval", "export"):
        message = refused(lbllm, tmp_path / "run", command, "--recipe", recipe)
        assert f"{file} was changed since" in message
        assert "--force" in message
    ok("ptq", "--recipe", recipe, "--force")
    ok("eval", "--recipe", recipe)


def test_missing_stage_names_the_command(lbllm, tmp_path, recipe):
    message = refused(lbllm, tmp_path / "run", "export", "--recipe", recipe)
    assert "lbllm ptq --recipe" in message
    assert "lbllm ptq --recipe" in refused(lbllm, tmp_path / "run", "eval", "--recipe", recipe, "eval.checkpoints=[ptq]")


def test_second_process_on_one_folder_is_refused(lbllm, tmp_path, recipe):
    code = (
        "import sys, pathlib, lbllm_cli.core.lock as c\n"
        "with c.locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        for command in ("ptq", "eval"):
            assert f"in use by process {holder.pid}" in refused(lbllm, tmp_path / "run", command, "--recipe", recipe)
        holder.stdin.close()


def test_nan_in_a_weight_stops_with_its_name_and_resumes(lbllm, ok, tmp_path, toy, recipe):
    tensors = load_file(toy / "model.safetensors")
    good = (toy / "model.safetensors").read_bytes()
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, toy / "model.safetensors", metadata={"format": "pt"})
    result = lbllm("ptq", "--recipe", recipe)
    assert result.exit_code == 1
    assert "model.layers.1.mlp.down_proj.weight" in result.stderr
    assert (tmp_path / "run" / "ptq.partial" / "block_000.safetensors").exists()
    (toy / "model.safetensors").write_bytes(good)
    ok("ptq", "--recipe", recipe)


def test_infinite_activation_stops_with_block_and_linear(lbllm, tmp_path):
    folder = save_toy(tmp_path / "hot")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][:] = 3e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path / "r.yaml", folder, tmp_path / "run")
    result = lbllm("ptq", "--recipe", recipe)
    assert result.exit_code == 1
    assert "block 1, mlp.gate_proj and mlp.up_proj" in result.stderr
    assert (tmp_path / "run" / "ptq.partial" / "progress.json").exists()
