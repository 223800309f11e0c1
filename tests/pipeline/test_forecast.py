"""What a run is going to need: from a configuration alone, and against what it uses."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import save_toy, write_recipe


def test_validate_forecasts_from_a_config_alone(ok, tmp_path):
    from transformers import LlamaConfig

    big = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    LlamaConfig(**big, max_position_embeddings=4096).save_pretrained(tmp_path / "7b")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "7b", tmp_path / "run", ptq={"group_size": 128})
    facts = json.loads(ok("validate", "--recipe", recipe, "--json").stdout)
    assert facts["parameters"] == 6_738_415_616
    assert facts["binarized_share"] == pytest.approx(0.961, abs=1e-3)
    assert any("no weights" in warning for warning in facts["warnings"])
    assert facts["forecast_bytes"]["ptq"]["disk"] == pytest.approx(6_476_005_376 * 2.375 / 8, rel=1e-6)
    assert not (tmp_path / "run").exists()


def test_a_forecast_beyond_the_ram_names_the_keys_that_lower_it(ok, tmp_path, monkeypatch):
    """Where streams are on disk already, other keys than theirs: an end-to-end phase holds the whole model."""
    recipe = write_recipe(tmp_path / "r.yaml", save_toy(tmp_path / "model"), tmp_path / "run")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    last = ("distill.end_to_end.sequences=8", "distill.end_to_end.recompute=always")
    warnings = json.loads(ok("validate", "--recipe", recipe, "--json", "runtime.streams=ram", *last).stdout)["warnings"]
    found = {warning.partition(":")[0]: warning for warning in warnings if "of RAM" in warning}
    assert "set runtime.streams: disk" in found["distill"]
    assert "train: [scales, norms]" in found["distill-e2e"]
    assert "streams" not in found["distill-e2e"]


@pytest.mark.slow
def test_forecast_of_ram_covers_what_a_run_uses(ok, tmp_path):
    folder = save_toy(tmp_path / "model", hidden_size=512, intermediate_size=1024, head_dim=64, num_attention_heads=8)
    recipe = write_recipe(tmp_path / "r.yaml", folder, tmp_path / "run")
    forecast = json.loads(ok("validate", "--recipe", recipe, "--json").stdout)["forecast_bytes"]["ptq"]["ram"]
    code = "import sys\nfrom lbllm_cli.cli.app import app\napp(sys.argv[1:])"
    command = [sys.executable, "-c", code, "ptq", "--recipe", str(recipe), "ptq.rounds=0"]
    subprocess.run(command, check=True, capture_output=True)
    events = (tmp_path / "run" / "ptq" / "events.jsonl").read_text().splitlines()
    used = json.loads(events[-1])["peak_ram_bytes"]
    assert 0.4 * forecast < used < 1.1 * forecast
