"""A packed folder that is damaged, or of another version, is refused by name before anything computes with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_toy, write_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lbllm_cli.hf  # noqa: F401 - registers the packed format
from lbllm_cli.cli import app

DOWN = "model.layers.1.mlp.down_proj"
INPUT = "model.layers.0.self_attn.q_proj.input"


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("export")
    recipe = write_recipe(
        base / "r.yaml", save_toy(base / "model"), base / "run", act_calib={"parent": "ptq", "epochs": 0}, ptq={"rounds": 0}
    )
    for command in ("ptq", "act-calib", "export"):
        result = CliRunner().invoke(app, [command, "--recipe", str(recipe)], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
    return base / "run" / "export"


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
    ],
)
def test_tensors_that_the_format_has_no_meaning_for(folder, name, change, message):
    edit(folder, name, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


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
    with pytest.raises(ValueError, match="packed format_version 9, this lbllm reads 2; update lbllm-cli"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_truncated_shard(folder, lbllm):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = lbllm("generate", "--model", folder, "--prompt", "the")
    assert result.exit_code == 2
    assert "is truncated or padded" in result.stderr
