"""Levels of 4 and of 2 bits through all stages: what is stored, what is run, and who refuses what."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_toy, write_recipe
from safetensors.torch import load_file
from stages import logits_of
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lbllm_cli.hf
from docs import reader
from lbllm_cli.format.settings import check_settings
from lbllm_cli.format.weights import PackedWeight

# Versions of a stage's manifest and of an export.
VERSIONS = {4: (2, 3), 2: (5, 7)}


@pytest.fixture(scope="module", params=VERSIONS)
def bits(request) -> int:
    """Of a level."""
    return request.param


@pytest.fixture(scope="module")
def run(once, bits) -> Path:
    """A toy with biases through all stages: groups of 32 are ragged."""
    from lbllm_cli.cli.app import app

    def make(folder: Path) -> Path:
        toy = save_toy(folder / "model", "qwen2-biases")
        # With a scale for each row, groups of inputs may be larger than those of weights.
        act = {"epochs": 0, "group_size": 64 if bits == 2 else None}
        sections = {"ptq": {"level_bits": bits}, "distill": {"epochs": 1}, "act_calib": act}
        recipe = write_recipe(folder / "r.yaml", toy, folder / "run", **sections)
        for command in ("ptq", "distill", "act-calib", "export"):
            result = CliRunner().invoke(app, [command, "--recipe", str(recipe)], catch_exceptions=False)
            assert result.exit_code == 0, result.stderr
        return folder / "run"

    return once(f"levels-of-{bits}-bits", make)


@pytest.mark.parametrize("stage", ["ptq", "distill", "act-calib"])
def test_every_stage_stores_them(run, bits, stage):
    manifest = json.loads((run / stage / "lbllm_stage.json").read_text())
    assert (manifest["format_version"], manifest["level_bits"]) == (VERSIONS[bits][0], bits)
    stored = load_file(run / stage / "block_001.safetensors")
    owners = PackedWeight.owners(stored)
    assert len(owners) == 7
    used: set[int] = set()
    for owner in owners:
        assert stored[f"{owner}.levels"].dtype == torch.uint8
        weight = PackedWeight.from_tensors(stored, owner, stored[f"{owner}.weight"].shape[1] * 32)
        assert weight.level_bits == bits
        largest = int(weight.levels.abs().max())
        assert 5 <= largest <= 7 if bits == 4 else 60 <= largest <= 127
        used |= set(stored[f"{owner}.levels"].flatten().tolist())
    # Of 256 bytes.
    assert len(used) > (60 if bits == 4 else 190)  # measured 73 and 213


def test_levels_under_an_earlier_version_are_refused(run, bits, tmp_path, lbllm):
    """Their bytes would be read as others: of 2 bits they named another table."""
    of_stage, of_export = (version - 1 for version in VERSIONS[bits])
    manifest = _copied(run, tmp_path) / "ptq" / "lbllm_stage.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": of_stage}))
    result = lbllm("distill", "--recipe", run.parent / "r.yaml", f"output.dir={tmp_path / 'run'}", "--force")
    assert result.exit_code == 2
    assert "format_version" in result.stderr
    settings = {"format_version": of_export, "group_size": 32, "linears": ["a"], "level_bits": bits}
    with pytest.raises(ValueError, match=f"format_version: expected {of_export + 1} or more where levels have {bits} bits"):
        check_settings(settings)
    check_settings(settings | {"format_version": of_export + 1})


def test_an_export_runs_with_what_the_specification_says(run, bits, tmp_path, ok):
    ok("export", "--recipe", run.parent / "r.yaml", "export.format=dense", f"output.dir={_copied(run, tmp_path)}")
    config = json.loads((run / "export" / "config.json").read_text())["quantization_config"]
    assert (config["format_version"], config["level_bits"]) == (VERSIONS[bits][1], bits)
    assert json.loads((run / "export" / "lbllm_export.json").read_text())["format_version"] == VERSIONS[bits][1]
    assert config["activations"]["group_size"] == {4: 32, 2: 64}[bits]
    packed, dense = reader.read_folder(run / "export"), reader.read_folder(tmp_path / "run" / "export")
    for name, wanted in dense.items():
        owner = name.removesuffix(".weight")
        if f"{owner}.levels" in packed:
            assert reader.weight(packed, owner, wanted.shape[1]).tobytes() == wanted.tobytes(), name
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    for name, module in model.named_modules():
        if hasattr(module, "dense_weight"):
            assert module.dense_weight().numpy().tobytes() == dense[f"{name}.weight"].tobytes(), name
    # A copy of the loaded model is the export again.
    model.save_pretrained(tmp_path / "saved")
    again = reader.read_folder(tmp_path / "saved")
    assert all(again[name].tobytes() == packed[name].tobytes() for name in packed)


@pytest.mark.usefixtures("in_torch")
def test_stock_transformers_reads_the_same_weights(run, tmp_path, ok):
    ok("export", "--recipe", run.parent / "r.yaml", "export.format=compressed-tensors", f"output.dir={_copied(run, tmp_path)}")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export", dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    lbllm_cli.hf.quantize_activations(packed, False)
    assert torch.equal(logits_of(stock), logits_of(packed))


def _copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def test_bits_are_counted(run, bits, ok):
    ok("eval", "--recipe", run.parent / "r.yaml", "eval.checkpoints=[ptq, export]")
    results = json.loads((run / "eval" / "results.json").read_text())
    stored = load_file(run / "ptq" / "block_000.safetensors")
    source = load_file(run.parent / "model" / "model.safetensors")
    owners = PackedWeight.owners(stored)
    # 64 bits of codes, and 16 of levels and 16 of a scale in a group of 32; or 8 of levels, and 16 of a scale in a row.
    groups = sum(stored[f"{owner}.weight"][..., 0].numel() for owner in owners)
    rows = sum(len(stored[f"{owner}.weight"]) for owner in owners)
    wanted = {4: 96 * groups, 2: 72 * groups + 16 * rows}[bits] / sum(source[f"{owner}.weight"].numel() for owner in owners)
    assert results["ptq"]["bits_per_weight"] == round(wanted, 4)
    assert results["export"]["bits_per_weight"] == results["ptq"]["bits_per_weight"]


def test_another_number_of_bits_is_refused(run, lbllm):
    keys = ("ptq.level_bits=8", "act_calib.group_size=null")
    result = lbllm("distill", "--recipe", run.parent / "r.yaml", *keys, "--force")
    assert result.exit_code == 2
    assert "ptq.level_bits" in result.stderr
