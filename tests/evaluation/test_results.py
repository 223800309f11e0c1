"""What the tables of `lbllm eval` show: everything that is measured of what is there, by whichever run, and nothing else."""

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from conftest import save_toy, write_recipe

from lbllm_cli.evaluation import run as evaluating
from lbllm_cli.evaluation.cache import Measurements
from lbllm_cli.evaluation.records import Named, NamedTask
from lbllm_cli.evaluation.tasks import GROUPS, Task
from lbllm_cli.report import figures as plots

NOVELS = '{"name":"novels","source":"builtin:evaluation/novels","length":32,"segments":2}'
MORE = '{"name":"more","source":"builtin:evaluation/modern","length":32,"segments":2}'
BOTH = f"data.evaluation=[{NOVELS},{MORE}]"


@pytest.fixture
def recipe(ok, tmp_path):
    """A recipe whose ptq checkpoint is there, of one block."""
    toy = save_toy(tmp_path / "model", num_hidden_layers=1)
    path = write_recipe(tmp_path / "recipe.yaml", toy, tmp_path / "run", ptq={"rounds": 0})
    ok("ptq", "--recipe", path)
    return path


@pytest.fixture
def riddles(monkeypatch):
    """A task of the name that `eval.tasks` has, answered without a model: importing lm-eval takes longer than all else here."""
    score = {"riddles": {"acc,none": 0.25, "acc_stderr,none": 0.1}}
    found = {"results": score, "n-samples": {"riddles": {"effective": 8}}}
    planned = lambda names, shots: [Task(name, name, shots, {name: {"version": 1}}) for name in names]  # noqa: E731
    monkeypatch.setattr("lbllm_cli.cli.evaluate.plan_tasks", planned)
    monkeypatch.setattr(evaluating.EvaluationRun, "_model_folder", lambda self, name: (None, False))
    monkeypatch.setattr(evaluating.EvaluationRun, "_open", lambda self, folder: MagicMock())
    monkeypatch.setattr(evaluating.lm_tasks, "run_task", lambda lm, task, limit: found)


def tables(tmp_path):
    return [json.loads((tmp_path / "run" / "eval" / f"{name}.json").read_text()) for name in ("results", "details")]


def test_a_run_of_less_leaves_what_was_measured_before(ok, recipe, tmp_path, riddles, monkeypatch):
    ok("eval", "--recipe", recipe, BOTH, "eval.tasks=[riddles]")
    before = tables(tmp_path)
    assert {name: (set(found["perplexity"]), set(found["tasks"])) for name, found in before[0].items()} == {
        name: ({"novels", "more"}, {"riddles"}) for name in ("base", "ptq")
    }
    for less in (["eval.checkpoints=[ptq]"], ["eval.checkpoints=[base]", "--force"]):
        asked = json.loads(ok("eval", "--recipe", recipe, f"data.evaluation=[{MORE}]", *less, "--json").stdout)
        assert [(set(found["perplexity"]), "tasks" in found) for found in asked.values()] == [({"more"}, False)]
        assert tables(tmp_path) == before
    monkeypatch.setattr(plots, "draw", lambda alt, paint, height=0: plots.Image(alt, "", ""))
    ok("report", "--recipe", recipe)
    page = (tmp_path / "run" / "report.md").read_text()
    assert f"| perplexity, novels | {before[0]['base']['perplexity']['novels']:,.2f} |" in page
    assert "| riddles, acc | 0.250 ± 0.100 | 0.250 ± 0.100 |" in page
    ok("export", "--recipe", recipe)
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "| perplexity, novels |" in card
    assert "| riddles, acc | 0.2500 | 0.2500 |" in card


def test_what_is_measured_is_shown_on_a_full_disk(ok, lbllm, recipe, tmp_path, monkeypatch):
    found = ok("eval", "--recipe", recipe, f"data.evaluation=[{NOVELS}]", "--json").stdout
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=0))
    on_disk = ["eval", "--recipe", recipe, "runtime.streams=disk"]
    assert ok(*on_disk, f"data.evaluation=[{NOVELS}]", "--json").stdout == found
    assert lbllm(*on_disk, f"data.evaluation=[{MORE}]").exit_code == 2


def test_what_is_of_another_text_or_checkpoint_is_not_shown(ok, recipe, tmp_path):
    ok("eval", "--recipe", recipe, BOTH)
    longer = NOVELS.replace('"segments":2', '"segments":3')
    now = json.loads(ok("eval", "--recipe", recipe, f"data.evaluation=[{longer}]", "eval.checkpoints=[ptq]", "--json").stdout)
    results, details = tables(tmp_path)
    assert results["base"]["perplexity"].keys() == details["base"].keys() == {"more"}
    assert results["ptq"]["perplexity"].keys() == {"novels", "more"}
    assert results["ptq"]["perplexity"]["novels"] == now["ptq"]["perplexity"]["novels"]
    ok("ptq", "--recipe", recipe, "ptq.levels=quantile", "--force")
    ok("eval", "--recipe", recipe, BOTH, "eval.checkpoints=[base]")
    results, details = tables(tmp_path)
    assert list(results) == list(details) == ["base"]
    # What is made back is known again; a text under another name is shown once, and what is damaged is not in the way.
    ok("ptq", "--recipe", recipe, "--force")
    ok("eval", "--recipe", recipe, f"data.evaluation=[{NOVELS.replace('novels', 'prose', 1)}]", "eval.checkpoints=[base]")
    assert [found["perplexity"].keys() for found in tables(tmp_path)[0].values()] == [{"prose", "more"}] * 2
    (tmp_path / "run" / "ptq" / "block_000.safetensors").unlink()
    ok("eval", "--recipe", recipe, "eval.checkpoints=[base]")
    assert list(tables(tmp_path)[0]) == ["base"]


def test_a_measurement_that_fails_now_is_known_no_more(ok, lbllm, recipe, tmp_path, monkeypatch):
    ok("eval", "--recipe", recipe)
    run = evaluating.Evaluation.run
    fail = lambda self, *given: {key: None if key[0] == "ptq" else one for key, one in run(self, *given).items()}  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(evaluating.Evaluation, "run", fail)
        assert lbllm("eval", "--recipe", recipe, "--force").exit_code == 1
    results, _ = tables(tmp_path)
    assert results["base"]["perplexity"].keys() == {"novels"}
    assert results["ptq"]["perplexity"] == {}


@pytest.mark.parametrize("names", ["[]", "{", '{"texts": {"novels": 7}}', '{"tasks": {"a": {"task": {}}}}'])
def test_names_that_are_damaged_are_those_of_this_run(ok, recipe, tmp_path, names):
    ok("eval", "--recipe", recipe, BOTH)
    (tmp_path / "run" / "eval" / "measured" / "names.json").write_text(names)
    ok("eval", "--recipe", recipe, f"data.evaluation=[{MORE}]")
    assert [found["perplexity"].keys() for found in tables(tmp_path)[0].values()] == [{"more"}] * 2


def test_half_a_file_of_a_killed_run_is_swept_up(ok, recipe, tmp_path):
    ok("eval", "--recipe", recipe, BOTH)
    # The base model is measured again beside whatever is missing: killed while that is kept, nothing may be missing afterwards.
    left = next((tmp_path / "run" / "eval" / "measured").glob("[0-9a-f]*.json"))
    left.with_name(f"{left.name}.tmp").write_text("{")
    ok("eval", "--recipe", recipe, BOTH)
    assert not list(left.parent.glob("*.tmp"))
    assert left.exists()


def task(limit=None, lines=()):
    return NamedTask(task={"t": {}}, num_fewshot=0, limit=limit, lm_eval="1", lines=list(lines))


def test_a_score_has_one_meaning(tmp_path):
    known = Measurements(tmp_path)
    known.name(Named(tasks={"tag": task(lines=["law", "art"]), "mmlu": task(lines=["mmlu"])}))
    # Another run's `law` would stand beside it under one name.
    assert known.name(Named(tasks={"law": task(lines=["law"])})).tasks.keys() == {"law", "mmlu"}


def test_an_average_is_of_tasks_that_were_asked_alike(tmp_path):
    known, members = Measurements(tmp_path), GROUPS["commonsense"][0]
    known.name(Named(tasks={name: task(lines=[name]) for name in members}, groups=["commonsense"]))
    assert known.name(Named()).groups == ["commonsense"]
    assert known.name(Named(tasks={members[0]: task(4, [members[0]])})).groups == []
