"""Every command and every piece of Python of the README runs as written, on a toy where the README has the real model."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, save_toy, write_recipe

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like a checkout after the model was fetched; the model is a toy."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").mkdir()
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        # Little text: the commands are under test here, not the numbers.
        for spec in values["data"]["evaluation"]:
            spec["segments"] = 1
        values["data"]["calibration"]["sequences"] = values["data"]["training"]["sequences"] = 8
        (folder / "recipes" / recipe.name).write_text(yaml.safe_dump(values), encoding="utf-8")
    toy = save_toy(folder / "models" / "smollm2-135m", max_position_embeddings=2048)
    (toy / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }} {% endfor %}", encoding="utf-8")
    return folder


def test_commands_run_as_written_in_order(checkout, ok, little_text, given_tables, monkeypatch):
    monkeypatch.chdir(checkout)
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("lbllm ")]
    assert len(commands) >= 6
    for command in commands:
        ok(*shlex.split(command, comments=True)[1:])


def test_python_runs_as_written(checkout, ok, little_text, monkeypatch):
    monkeypatch.chdir(checkout)
    if not (checkout / "runs" / "smollm2-135m" / "export").exists():
        ok("ptq", "--recipe", "recipes/smollm2-135m.yaml")
        ok("export", "--recipe", "recipes/smollm2-135m.yaml")
    (code,) = blocks("python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert type(names["model"].model.layers[0].mlp.up_proj).__name__ == "PackedLinear"


def test_make_targets_of_the_readme_exist():
    targets = {line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")}
    assert targets >= {"test", "demo"}
    environment = {**os.environ, "MAKEFLAGS": ""}
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True, env=environment)


def test_recipe_headers_name_commands_that_exist(ok):
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        header = [line.lstrip("# ") for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        commands = [part for line in header for part in re.findall(r"lbllm ([\w-]+) +--recipe ([\w./-]+)", line)]
        stages = {"ptq", "distill", "act-calib", "eval", "export"}
        assert recipe.name == "demo.yaml" or {name for name, _ in commands} >= stages, recipe
        for _, path in commands:
            assert (ROOT / path).exists(), path
        assert any("Needs:" in line for line in recipe.read_text(encoding="utf-8").splitlines()), recipe


def test_recipes_of_the_readme_are_valid(checkout, ok, monkeypatch):
    monkeypatch.chdir(checkout)
    for number, text in enumerate(blocks("yaml")):
        recipe = checkout / f"readme-{number}.yaml"
        recipe.write_text(text, encoding="utf-8")
        ok("config", "--recipe", recipe)


def make(recipe: Path, run: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = ["make", "-f", ROOT / "recipes" / "batch.mk", f"RECIPE={recipe}", f"RUN={run}", *words]
    # Without the level of the `make test` around it: a make below another announces its directories.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run([*map(str, command)], check=False, capture_output=True, text=True, env=environment)


def make_says(recipe: Path, run: Path, *words: str) -> str:
    found = make(recipe, run, "--dry-run", *words, f"LBLLM={sys.executable} -m lbllm_cli")
    assert found.returncode == 0, found.stderr
    return found.stdout


def arguments_of(said: str) -> list[str]:
    """What stands between the command and its recipe in the lines that make would run."""
    return [line.partition(" lbllm_cli ")[2].partition(" --recipe")[0] for line in said.splitlines()]


def test_batch_job_runs_what_is_missing_and_then_has_nothing_to_do(tmp_path, ok, given_tables):
    recipe = write_recipe(tmp_path / "r.yaml", save_toy(tmp_path / "model"), tmp_path / "run", ptq={"rounds": 0})
    expected = ["ptq", "distill --only blocks", "act-calib --only blocks", "eval", "report", "export"]
    said = arguments_of(make_says(recipe, tmp_path / "run"))
    assert said == expected
    for command in expected:
        ok(*command.split(), "--recipe", recipe)
    assert "Nothing to be done" in make_says(recipe, tmp_path / "run")
    # A recipe that was only touched: what is up to date becomes newer than it, or Make would never end.
    os.utime(recipe, (time.time() + 5, time.time() + 5))
    assert len(make_says(recipe, tmp_path / "run").splitlines()) == len(expected)
    os.utime(recipe)
    for command in expected:
        ok(*command.split(), "--recipe", recipe)
    assert "Nothing to be done" in make_says(recipe, tmp_path / "run")


def test_a_batch_job_makes_every_stage_of_its_recipe_once(tmp_path):
    """End-to-end phases are stages of their own, with a manifest that the next depends on and a command that makes it alone."""
    last = {"epochs": 0, "sequences": 4}
    recipe = write_recipe(
        tmp_path / "r.yaml", tmp_path, tmp_path / "run", distill={"end_to_end": last}, act_calib={"end_to_end": last}
    )
    said = arguments_of(make_says(recipe, tmp_path / "run"))
    stages = [f"{command} --only {phase}" for command in ("distill", "act-calib") for phase in ("blocks", "end-to-end")]
    assert said == ["ptq", *stages, "eval", "report", "export"]


def test_keys_of_a_batch_job_go_to_every_command_and_decide_its_stages(tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path, tmp_path / "run")
    keys = "distill.batch_size=8 distill.end_to_end.sequences=4"
    said = make_says(recipe, tmp_path / "run", f"KEYS={keys}").splitlines()
    assert all(keys in line for line in said)
    assert any("distill --only end-to-end" in line for line in said)


def batch_job(folder: Path, commands: str, *targets: Path) -> int:
    """Exit code of a batch job in folder/run whose lbllm does `commands` of a shell in the place of everything but `config`."""
    recipe, fake = write_recipe(folder / "r.yaml", folder, folder / "run"), folder / "fake"
    own = f'config) exec {sys.executable} -m lbllm_cli "$@";;'
    fake.write_text(f'#!/bin/sh\ncase "$1" in {own} {commands} esac\n', encoding="utf-8")
    fake.chmod(0o755)
    return make(recipe, folder / "run", f"LBLLM={fake}", *targets).returncode


def test_no_file_of_a_batch_job_is_deleted_where_a_command_fails_after_it_was_written(tmp_path):
    """Make would take the manifest of a finished stage with it, and days of work."""
    manifest = tmp_path / "run" / "ptq" / "lbllm_stage.json"
    assert batch_job(tmp_path, f"*) mkdir -p {manifest.parent}; echo done > {manifest}; exit 1;;") == 2
    assert manifest.exists()


def test_what_a_failed_eval_has_measured_is_not_all_of_it(tmp_path):
    """It writes the rest, and fails: a batch job that is given again measures again."""
    run, results = tmp_path / "run", tmp_path / "run" / "eval" / "results.json"
    stages = f"*) mkdir -p {run}/$1; echo done > {run}/$1/lbllm_stage.json;;"
    commands = f"eval) mkdir -p {results.parent}; echo {{}} > {results}; exit 1;; {stages}"
    assert [batch_job(tmp_path, commands, results) for _ in range(2)] == [2, 2]
    assert results.exists()
