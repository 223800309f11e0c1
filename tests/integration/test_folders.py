"""What lies in the output folder and is not lbllm's, or is what a run reads, is there afterwards as it was."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import save_toy, write_recipe
from typer.testing import CliRunner

from lbllm_cli.cli.app import app
from lbllm_cli.report import figures as plots

STAGES = ("ptq", "distill", "distill-e2e", "act-calib", "act-calib-e2e")
LAST = {"sequences": 6, "held_out": 0.2, "epochs": 0}
QUICK = {
    "distill": {"epochs": 0, "end_to_end": LAST},
    "act_calib": {"epochs": 0, "bits": 3, "kv_form": "uniform", "form": "uniform", "end_to_end": LAST},
}


def content(folder: Path) -> dict[str, str]:
    """Everything in a folder, links as such."""
    found = {}
    for path in sorted(folder.rglob("*")):
        key = str(path.relative_to(folder))
        if path.is_symlink():
            found[key] = os.readlink(path)
        elif path.is_file() and path.name != ".lock":
            found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def refused(lbllm, folder: Path, *arguments) -> str:
    """The message of a refused command, which has changed nothing."""
    before = content(folder)
    result = lbllm(*arguments)
    assert result.exit_code == 2, result.stderr
    assert content(folder) == before
    return result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a model, a recipe, and a run of every stage and an export."""
    folder = tmp_path_factory.mktemp("finished")
    model = save_toy(folder / "model", num_hidden_layers=2)
    write_recipe(folder / "recipe.yaml", model, folder / "run", **QUICK)
    for command in ("ptq", "distill", "act-calib", "export"):
        result = CliRunner().invoke(app, [command, "--recipe", str(folder / "recipe.yaml")], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
    assert {path.name for path in (folder / "run").iterdir()} == {*STAGES, "export", ".lock"}
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run: its recipe."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return write_recipe(tmp_path / "recipe.yaml", finished / "model", tmp_path / "run", **QUICK)


@pytest.mark.parametrize("options", [(), ("--force",), ("--dry-run",), ("--dry-run", "--force")])
@pytest.mark.parametrize("name", ["ptq", "ptq.partial", "ptq.replaced"])
def test_a_folder_of_the_users_with_a_stages_name(lbllm, tmp_path, recipe, name, options):
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "notes.txt").write_text("mine")
    message = refused(lbllm, tmp_path, "ptq", "--recipe", recipe, *options)
    assert f"{tmp_path / 'run' / name} holds notes.txt" in message
    assert "move it away" in message


def test_a_project_folder_as_output(lbllm, tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ptq", "export"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text("mine")
    assert "holds train.py" in refused(lbllm, tmp_path, "ptq", "--recipe", recipe, "output.dir=.", "--force")


def test_a_file_of_the_users_in_a_finished_stage(lbllm, ok, tmp_path, run):
    for stage in STAGES:
        (tmp_path / "run" / stage / "notes.txt").write_text("mine")
    before = content(tmp_path)
    for command in ("ptq", "distill", "act-calib"):
        assert "up to date" in ok(command, "--recipe", run).stderr
    assert content(tmp_path) == before
    for command, stage in (("ptq", "ptq"), ("distill", "distill"), ("act-calib", "act-calib")):
        message = refused(lbllm, tmp_path, command, "--recipe", run, "--force")
        assert f"{tmp_path / 'run' / stage} holds notes.txt" in message
    for command, stage in (("distill", "distill-e2e"), ("act-calib", "act-calib-e2e")):
        message = refused(lbllm, tmp_path, command, "--recipe", run, "--force", "--only", "end-to-end")
        assert f"{tmp_path / 'run' / stage} holds notes.txt" in message


@pytest.mark.parametrize("tail", ["", ".partial", ".replaced"])
@pytest.mark.parametrize("kind", ["alone", "beside"])
def test_a_file_of_the_users_in_an_export(lbllm, ok, tmp_path, run, tail, kind):
    place = tmp_path / "run" / f"export{tail}"
    if kind == "alone" and not tail:
        shutil.rmtree(place)
    if kind == "beside" and tail:
        shutil.copytree(tmp_path / "run" / "export", place)
    place.mkdir(exist_ok=True)
    (place / "notes.txt").write_text("mine")
    message = refused(lbllm, tmp_path, "export", "--recipe", run, "--force", "export.format=dense")
    assert f"{place} holds notes.txt" in message
    (place / "notes.txt").unlink()
    ok("export", "--recipe", run, "--force", "export.format=dense")
    assert not list((tmp_path / "run").glob("export.*"))


def test_a_model_folder_with_the_exports_name_is_no_export(lbllm, tmp_path, run):
    shutil.rmtree(tmp_path / "run" / "export")
    save_toy(tmp_path / "run" / "export")
    assert "nothing that only lbllm writes" in refused(lbllm, tmp_path, "export", "--recipe", run, "--force")


@pytest.mark.parametrize("name", ["streams", "ptq.model", "ptq.model.partial", "ptq.model.replaced"])
def test_a_folder_of_the_users_in_eval(lbllm, tmp_path, run, name):
    (tmp_path / "run" / "eval" / name).mkdir(parents=True)
    (tmp_path / "run" / "eval" / name / "notes.txt").write_text("mine")
    tasks = "eval.tasks=[builtin:continuation]"
    message = refused(lbllm, tmp_path, "eval", "--recipe", run, "eval.checkpoints=[base, ptq]", tasks, "runtime.streams=disk")
    assert f"{tmp_path / 'run' / 'eval' / name} holds notes.txt" in message


@pytest.mark.parametrize("name", ["results.json", "details.json"])
def test_results_of_something_else(lbllm, tmp_path, run, name):
    (tmp_path / "run" / "eval").mkdir()
    (tmp_path / "run" / "eval" / name).write_text('{"mine": 1}')
    assert f"{name} is not of `lbllm eval`" in refused(lbllm, tmp_path, "eval", "--recipe", run, "eval.checkpoints=[base]")


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_a_report_of_somebody_else(lbllm, ok, tmp_path, run, name, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda alt, paint, height=0: plots.Image(alt, "", ""))
    (tmp_path / "run" / name).write_text("# My report\n")
    assert f"{name} is not of `lbllm report`" in refused(lbllm, tmp_path, "report", "--recipe", run)
    (tmp_path / "run" / name).unlink()
    for _ in range(2):
        ok("report", "--recipe", run)


def test_models_and_text_where_lbllm_writes(lbllm, tmp_path, run):
    folder, model = tmp_path / "run", save_toy(tmp_path / "model", num_hidden_layers=2)
    shutil.rmtree(folder / "export")
    for name in ("export", "ptq.replaced", "eval/model", "act-calib.partial"):
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        model.rename(place)
        message = refused(lbllm, tmp_path, "ptq", "--recipe", run, f"model.path={place}")
        assert f"model.path {place} overlaps with {folder / name.split('/')[0]}" in message
        model = place
    inside = model / "deep" / "run"
    assert "overlaps with" in refused(lbllm, tmp_path, "ptq", "--recipe", run, f"model.path={model}", f"output.dir={inside}")
    beside = folder / "model"
    model.rename(beside)
    result = lbllm("validate", "--recipe", run, f"model.path={beside}")
    assert result.exit_code == 0, result.stderr


def test_an_export_is_not_its_own_source(lbllm, ok, tmp_path, run):
    folder = tmp_path / "run"
    ok("export", "--recipe", run, "export.format=dense")
    for stage in STAGES:
        shutil.rmtree(folder / stage)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "model").mkdir()
    for file in (folder / "export").iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    for path, output in (
        (folder / "export", folder),
        (tmp_path / "link" / "export", folder),
        (folder / "export", tmp_path / "link"),
        (folder / "export" / ".." / "export", folder),
        (tmp_path / "model", folder),
    ):
        message = refused(lbllm, tmp_path, "ptq", "--recipe", run, f"model.path={path}", f"output.dir={output}")
        assert "model.path" in message
        assert "overlaps with" in message


@pytest.mark.parametrize(
    ("key", "command"),
    [
        ("data.calibration.source", "ptq"),
        ("data.training.source", "export"),
        ("distill.end_to_end.source", "eval"),
        ("act_calib.end_to_end.source", "validate"),
    ],
)
def test_text_where_lbllm_writes(lbllm, tmp_path, run, key, command):
    text = tmp_path / "run" / "export" / "text.txt"
    text.write_text("mine")
    message = refused(lbllm, tmp_path, command, "--recipe", run, f"{key}={text}")
    assert f"{key.removesuffix('.source')}: source {text} overlaps with {text.parent}" in message


@pytest.mark.parametrize("place", ["run", "run/ptq", "run/eval/teacher", "model", "model/states", "."])
def test_a_teachers_folder_where_others_are(lbllm, finished, tmp_path, run, place):
    shutil.copytree(finished / "model", tmp_path / "model")
    teacher = tmp_path / place
    changed = ("distill", "--recipe", run, f"model.path={tmp_path / 'model'}", f"distill.end_to_end.teacher={teacher}")
    message = refused(lbllm, tmp_path, *changed)
    assert "distill.end_to_end.teacher" in message
    assert "overlaps with" in message or "is output.dir" in message


@pytest.mark.parametrize("name", ["ptq", "distill.partial", "export", "report.html", ".lock", "eval"])
def test_a_link_that_leads_to_itself(lbllm, tmp_path, recipe, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "run" / name)
    for command in ("ptq", "eval", "validate"):
        assert f"{tmp_path / 'run' / name} is no " in refused(lbllm, tmp_path, command, "--recipe", recipe)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for key in ("model.path", "data.calibration.source", "output.dir"):
        assert str(loop) in refused(lbllm, tmp_path, "ptq", "--recipe", recipe, f"{key}={loop}")


FOLDERS = ("ptq", "ptq.partial", "ptq.replaced", "act-calib-e2e", "export", "export.partial", "generated", "eval", "eval/streams")
FILES = (".lock", "report.html", "report.md", "eval/results.json", "eval/details.json")


@pytest.mark.parametrize("command", ["eval", "validate"])
@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_a_file_where_a_folder_belongs_and_a_folder_for_a_file(lbllm, tmp_path, recipe, name, command):
    place = tmp_path / "run" / name
    place.parent.mkdir(parents=True)
    if name in FILES:
        place.mkdir()
    else:
        place.write_text("mine")
    message = refused(lbllm, tmp_path, command, "--recipe", recipe)
    assert f"{place} is no {'file' if name in FILES else 'folder'}" in message


@pytest.mark.parametrize(
    ("path", "expected"),
    [("~nosuchuser/run", "there is no such user"), ("x" * 300, "is not a path"), ("/".join(["x" * 200] * 20), "too long")],
)
@pytest.mark.parametrize("command", ["ptq", "report", "validate"])
def test_paths_that_no_system_has(lbllm, tmp_path, recipe, monkeypatch, path, expected, command):
    monkeypatch.chdir(tmp_path)
    message = refused(lbllm, tmp_path, command, "--recipe", recipe, f"output.dir={path}")
    assert "output.dir" in message
    assert expected in message


def test_the_whole_chain_of_parents_is_compared(lbllm, ok, tmp_path, run):
    assert "up to date" in ok("act-calib", "--recipe", run).stderr
    assert "up to date" in ok("export", "--recipe", run).stderr
    ok("ptq", "--recipe", run, "ptq.rounds=0", "--force")
    changed = ("--recipe", run, "ptq.rounds=0")
    for command in (("act-calib",), ("act-calib", "--only", "end-to-end"), ("export",), ("distill", "--only", "end-to-end")):
        message = refused(lbllm, tmp_path / "run", command[0], *changed, *command[1:])
        assert "distill was made from another ptq checkpoint than the one in" in message
        assert "run: lbllm distill --recipe ... --force" in message
    # A chain whose beginning is gone cannot be compared, and is used as ever.
    shutil.rmtree(tmp_path / "run" / "ptq")
    assert "up to date" in ok("export", *changed).stderr


def test_a_recipe_that_would_make_an_ancestor_differently(lbllm, tmp_path, run):
    values = yaml.safe_load(run.read_text())
    values["ptq"]["damping"] = 0.5
    run.write_text(json.dumps(values))
    for command in (("distill",), ("act-calib",), ("act-calib", "--only", "end-to-end")):
        message = refused(lbllm, tmp_path / "run", command[0], "--recipe", run, *command[1:])
        assert "ptq.damping: 0.01 -> 0.5" in message
