"""The command line itself: help, version, dry runs, progress, streams of output."""

import errno
import json
import os
import subprocess
import sys

import pytest
import yaml

COMMANDS = ("init", "ptq", "distill", "act-calib", "eval", "report", "export", "generate", "validate", "config")


def test_help_lists_every_command_and_imports_no_torch():
    code = "import sys\nfrom lbllm_cli.cli.app import app\ntry:\n    app(['--help'])\n"
    code += "finally:\n    assert not {'torch', 'transformers'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example(ok, command):
    assert "Example: lbllm" in ok(command, "--help").stdout


def test_an_export_that_is_up_to_date_is_written_again_by_force_alone(ok, tmp_path, recipe):
    assert "write it again where it is up to date" in " ".join(ok("export", "--help").stdout.replace("│", " ").split())
    ok("ptq", "--recipe", recipe, "ptq.rounds=0")
    for keys, written in (([], True), ([], False), (["--force"], True), (["export.format=dense"], True)):
        assert ("up to date" not in ok("export", "--recipe", recipe, "ptq.rounds=0", *keys).stderr) == written


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


def test_config_lists_the_recipes_that_come_with_lbllm(ok):
    lines = dict(line.split("\t") for line in ok("config", "--list").stdout.splitlines())
    assert lines["llama2-7b"].startswith("LLaMA-2-7B, group 128")
    assert not any(text.startswith(("#", "yaml-language-server")) for text in lines.values())


def test_config_prints_the_schema(ok):
    schema = json.loads(ok("config", "--schema").stdout)
    assert schema["required"] == ["model", "output"]
    assert "act-calib-e2e" in schema["$defs"]["Export"]["properties"]["checkpoint"]["enum"]


def test_config_without_a_recipe_says_what_it_needs(lbllm):
    result = lbllm("config")
    assert result.exit_code == 2
    assert "config needs --recipe" in result.stderr


def test_eval_prints_a_table_and_measures_what_is_asked(ok, recipe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
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


def test_messages_are_bounded_and_can_be_written(lbllm, tmp_path, recipe, monkeypatch):
    from lbllm_cli.core.errors import UsageError
    from lbllm_cli.pipeline import runner

    def refuse(*_: object, **options: object) -> None:
        raise UsageError("half a pair: \ud800 " + "x" * 100_000)

    monkeypatch.setattr(runner, "run_command", refuse)
    result = lbllm("ptq", "--recipe", recipe)
    assert result.exit_code == 2
    assert "half a pair: \\ud800 xxx" in result.stderr
    assert len(result.stderr) < 10_000


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((n, 1) for n in (errno.ENOENT, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EPERM, errno.EACCES, errno.EROFS)),
        *((n, 2) for n in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)),
    ],
)
def test_errors_of_the_system_are_one_message(lbllm, recipe, monkeypatch, number, code):
    from lbllm_cli.pipeline import runner

    def refuse(*_: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), "run/ptq")

    monkeypatch.setattr(runner, "run_command", refuse)
    result = lbllm("ptq", "--recipe", recipe)
    assert result.exit_code == code
    mended = {
        errno.ENOSPC: "free some space there",
        errno.EDQUOT: "free some space there",
        errno.EPERM: "let this user read and write there, or name another place,",
        errno.EACCES: "let this user read and write there, or name another place,",
        errno.EROFS: "have that disk mounted for writing, or name another place,",
        errno.ENOTDIR: "move away what is there",
        errno.EISDIR: "move away what is there",
    }.get(number, "mend it")
    said = f"lbllm: {os.strerror(number)} (run/ptq); {mended} and run the same command again"
    assert result.stderr == f"{said} to resume\n"
    # What does not go on does not say so.
    monkeypatch.setattr("lbllm_cli.report.build.report", refuse)
    result = lbllm("report", "--recipe", recipe)
    assert (result.exit_code, result.stderr) == (code, f"{said}\n")


def test_both_files_of_a_copy_that_fails_are_named(lbllm, recipe, monkeypatch):
    def refuse(*_: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model/a", None, "run/a")

    monkeypatch.setattr("lbllm_cli.report.build.report", refuse)
    assert lbllm("report", "--recipe", recipe).stderr.startswith("lbllm: No space left on device (model/a -> run/a); free")
