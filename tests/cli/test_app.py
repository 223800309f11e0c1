"""The command line itself: help, version, dry runs, progress, streams of output."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import save_toy, write_recipe
from safetensors.torch import save_file

COMMANDS = ("ptq", "distill", "act-calib", "eval", "report", "export", "generate", "validate", "config")


def test_help_lists_every_command_and_imports_no_torch():
    code = "import sys\nfrom lbllm_cli.cli.app import app\ntry:\n    app(['--help'])\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 5  # measured 0.4 s; a torch import alone takes longer than a slow machine's whole answer
    for command in COMMANDS:
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example(ok, command):
    assert "Example: lbllm" in ok(command, "--help").stdout


def test_unknown_option_is_usage(lbllm, recipe):
    assert lbllm("ptq", "--recipe", recipe, "--nonsense").exit_code == 2
    assert lbllm("ptq").exit_code == 2


def test_dry_runs_write_nothing(ok, tmp_path, recipe):
    assert "would write" in ok("ptq", "--recipe", recipe, "--dry-run").stderr
    assert not (tmp_path / "run").exists()
    assert "would measure base" in ok("eval", "--recipe", recipe, "--dry-run").stderr
    assert not (tmp_path / "run").exists()
    ok("ptq", "--recipe", recipe)
    assert "would write" in ok("export", "--recipe", recipe, "--dry-run").stderr
    assert not (tmp_path / "run" / "export").exists()


def test_ptq_logs_one_line_and_one_record_per_block(ok, tmp_path, recipe):
    result = ok("ptq", "--recipe", recipe)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    records = [json.loads(line) for line in (tmp_path / "run" / "ptq" / "events.jsonl").read_text().splitlines()]
    assert [record["block"] for record in records] == [0, 1, 2]
    assert set(records[0]["linears"]) == {
        f"self_attn.{p}_proj" for p in "qkvo"
    } | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}  # fmt: skip
    assert "% of" in result.stderr
    assert "parameters are binarized" in result.stderr


def test_manifest_holds_no_clock_and_no_path(ok, tmp_path, recipe):
    ok("ptq", "--recipe", recipe)
    manifest = json.loads((tmp_path / "run" / "ptq" / "lbllm_stage.json").read_text())
    assert str(tmp_path) not in json.dumps(manifest)
    assert manifest["tokens"] == 6 * 32
    assert manifest["binarized_parameters"] / manifest["parameters"] == pytest.approx(0.6, abs=0.2)
    environment = json.loads((tmp_path / "run" / "ptq" / "environment.json").read_text())
    assert environment["threads"] == 1


def test_config_prints_a_recipe_that_reads_back_the_same(ok, tmp_path, recipe):
    printed = ok("config", "--recipe", recipe, "ptq.group_size=48").stdout
    (tmp_path / "again.yaml").write_text(printed)
    assert yaml.safe_load(printed)["ptq"]["group_size"] == 48
    assert ok("config", "--recipe", tmp_path / "again.yaml").stdout == printed


def test_eval_prints_a_table_and_measures_what_is_asked(ok, recipe):
    ok("ptq", "--recipe", recipe)
    table = ok("eval", "--recipe", recipe).stdout
    assert "perplexity, novels" in table
    assert "bits per weight" in table
    assert list(json.loads(ok("eval", "--recipe", recipe, "--json", "eval.checkpoints=[ptq]").stdout)) == ["ptq"]


def test_streams_on_disk_give_the_same_perplexity_and_leave_nothing(ok, tmp_path, recipe):
    ok("ptq", "--recipe", recipe)
    in_ram = ok("eval", "--recipe", recipe, "--json").stdout
    assert ok("eval", "--recipe", recipe, "--json", "--force", "runtime.streams=disk").stdout == in_ram
    assert not list((tmp_path / "run").rglob("*.bin"))


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


def test_generate_is_deterministic_at_temperature_zero(ok, recipe, tmp_path):
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    command = ("generate", "--model", tmp_path / "run" / "export", "--prompt", "the", "--max-new-tokens", "6")
    assert ok(*command).stdout == ok(*command).stdout
    assert re.search(r"prefill \d+ tokens, [\d.]+ tokens/s; decode 5 tokens, [\d.]+ tokens/s, \d+ threads", ok(*command).stderr)
    assert ok(*command, "--temperature", "1", "--seed", "1").stdout == ok(*command, "--temperature", "1", "--seed", "1").stdout


def test_generate_stops_when_its_reader_does(ok, recipe, tmp_path):
    from lbllm_cli.models.sampling import stream_text

    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    config = tmp_path / "run" / "export" / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 200000'))
    pieces = stream_text(tmp_path / "run" / "export", "the", True, 100_000, 0.0, 0, torch.device("cpu"), False, print)
    next(pieces)
    began = time.monotonic()
    pieces.close()
    assert time.monotonic() - began < 5  # to the last token it would take minutes


def test_generate_without_a_token_to_begin_with(ok, lbllm, recipe, tmp_path):
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    result = lbllm("generate", "--model", tmp_path / "run" / "export", "--raw", "--prompt", "")
    assert result.exit_code == 2
    assert "--prompt is empty" in result.stderr


def test_generate_names_what_is_wrong_with_its_folder(lbllm, tmp_path, toy):
    assert "is not a folder" in lbllm("generate", "--model", tmp_path / "none", "--prompt", "x").stderr
    (toy / "model.safetensors").unlink()
    result = lbllm("generate", "--model", toy, "--prompt", "x")
    assert result.exit_code == 2
    assert "has no weights" in result.stderr


def test_generated_calibration_text_is_cached_and_reproducible(ok, tmp_path, recipe):
    command = ("ptq", "--recipe", recipe, "data.calibration.source=generate:")
    assert "sampled from the model" in ok(*command).stderr
    (cache,) = (tmp_path / "run" / "generated").iterdir()
    first = cache.read_bytes()
    assert "up to date" in ok(*command).stderr
    cache.unlink()
    assert "up to date" in ok(*command).stderr
    assert cache.read_bytes() == first


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 50, {"other": torch.zeros(6, 32, dtype=torch.int64)}, {"input_ids": torch.zeros(6, 31, dtype=torch.int64)},
     {"input_ids": torch.zeros(6, 32)}, {"input_ids": torch.full((6, 32), 1024)}, {"input_ids": torch.full((6, 32), -1)}],
    ids=range(7),
)  # fmt: skip
def test_sampled_text_that_is_damaged_is_refused(lbllm, ok, tmp_path, recipe, content):
    from lbllm_cli.models.sampling import cached_sample
    from lbllm_cli.pipeline.plan import prepare
    from lbllm_cli.recipe.base import Source
    from lbllm_cli.recipe.load import load_recipe

    command = ("ptq", "--recipe", recipe, "data.calibration.source=generate:")
    plan = prepare(load_recipe(recipe))
    cached_sample(plan.model, plan.tokenizer, tmp_path / "run", Source(source="generate:"), 6, 32, 0)
    (cache,) = (tmp_path / "run" / "generated").iterdir()
    save_file(content, cache) if isinstance(content, dict) else cache.write_bytes(content)
    result = lbllm(*command)
    assert result.exit_code == 2
    assert f"{cache} is damaged" in result.stderr
    assert "delete it" in result.stderr


def test_messages_are_bounded_and_can_be_written(lbllm, tmp_path, recipe, monkeypatch):
    from lbllm_cli.core.errors import UsageError
    from lbllm_cli.pipeline import commands

    def refuse(*_: object, **options: object) -> None:
        raise UsageError("half a pair: \ud800 " + "x" * 100_000)

    monkeypatch.setattr(commands, "ptq", refuse)
    result = lbllm("ptq", "--recipe", recipe)
    assert result.exit_code == 2
    assert "half a pair: \\ud800 xxx" in result.stderr
    assert len(result.stderr) < 10_000


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOENT, 1), (errno.EPERM, 1), *((n, 2) for n in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP))],
)
def test_errors_of_the_system_are_one_message(lbllm, recipe, monkeypatch, number, code):
    from lbllm_cli.pipeline import commands

    def refuse(*_: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), "run/ptq")

    monkeypatch.setattr(commands, "ptq", refuse)
    result = lbllm("ptq", "--recipe", recipe)
    assert result.exit_code == code
    assert result.stderr.startswith(f"lbllm: {os.strerror(number)} (run/ptq); mend it")
