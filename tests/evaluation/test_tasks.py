"""lm-eval inside `lbllm eval`: the numbers of lm-eval's own command line, and refusals before a model is loaded."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import save_toy, write_recipe
from safetensors.torch import load_file, save_file

from lbllm_cli.core.errors import UsageError
from lbllm_cli.data import hub
from lbllm_cli.evaluation import tasks as lm_tasks
from lbllm_cli.export import writer as exporting

# Its command line twice in one process, since importing lm-eval takes longer than the task: for the model as it is, then for
# its packed export with the plugin. It looks for tasks in the folder that it is given alone: its own are thousands of files.
TWICE = """
import functools, json, sys
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
for plugin, sys.argv in json.loads(sys.argv[1]):
    if plugin:
        import lbllm_cli.hf
    cli_evaluate()
"""
TASK = {
    "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice", "num_fewshot": 0,
    "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    "metadata": {"version": 3},
}  # fmt: skip
WORDS = ["the sea was calm", "a letter came", "he walked to the house", "nobody spoke of it", "rain fell all night"]


def write_task(folder: Path, name: str, items: int = 12, **changes) -> Path:
    """A task's YAML with its data beside it."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("w") as handle:
        for i in range(items):
            choices = [WORDS[(i + k) % len(WORDS)] + "." * (i % 3) for k in range(4)]
            handle.write(json.dumps({"context": f"Chapter {i}. Then {WORDS[i % 5]},", "choices": choices, "gold": i % 4}) + "\n")
    task = {"task": name, **TASK, "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, **changes}
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder / f"{name}.yaml"


def of_the_command_line(models: dict[Path, bool], task: Path, output: Path) -> list[dict]:
    """lm-eval's own results for models, with or without the plugin. Its command line looks for data files where it runs."""
    runs = []
    for number, (model, plugin) in enumerate(models.items()):
        arguments = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", "8"]
        arguments += ["--tasks", task.stem, "--include_path", str(task.parent), "--output_path", str(output / str(number))]
        runs.append((plugin, ["lm-eval", *arguments]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", TWICE, json.dumps(runs)]
    subprocess.run(command, check=True, capture_output=True, cwd=task.parent, env=environment)
    found = [next((output / str(number)).rglob("results_*.json")) for number in range(len(runs))]
    return [json.loads(path.read_text())["results"][task.stem] for path in found]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Prepared datasets go where the test's other files are."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.mark.slow
def test_same_numbers_as_lm_evals_command_line(ok, recipe, tmp_path):
    task = write_task(tmp_path / "tasks", "stories")
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    wanted = ("eval.checkpoints=[base, ptq, export]", f"eval.tasks=[{task}]")
    results = json.loads(ok("eval", "--recipe", recipe, *wanted, "--json").stdout)
    assert results["ptq"]["tasks"] == results["export"]["tasks"]
    theirs = of_the_command_line({tmp_path / "model": False, tmp_path / "run/export": True}, task, tmp_path / "own")
    for name, expected in zip(("base", "export"), theirs, strict=True):
        mine = results[name]["tasks"]["stories"]
        for metric in ("acc", "acc_norm"):
            assert mine[metric] == expected[f"{metric},none"], name
            assert mine[f"{metric}_stderr"] == expected[f"{metric}_stderr,none"], name
        assert mine["samples"] == 12
        whole = json.loads((tmp_path / "run/eval/lm-eval" / name / "stories.json").read_text())
        assert whole["results"]["stories"]["acc,none"] == expected["acc,none"]
        assert whole["config"]["batch_size"] == 8
    table = ok("eval", "--recipe", recipe, *wanted).stdout
    assert "stories, acc" in table
    assert f"{results['base']['tasks']['stories']['acc']:.3f} ±" in table
    assert not list((tmp_path / "run/eval").glob("*.model"))


def test_a_task_that_is_added_costs_only_itself(ok, recipe, tmp_path, monkeypatch):
    first, second = (write_task(tmp_path / "tasks", name) for name in ("first", "second"))
    ran = []
    run = lm_tasks.run_task
    monkeypatch.setattr(lm_tasks, "run_task", lambda lm, task, limit: ran.append(task.name) or run(lm, task, limit))
    before = json.loads(ok("eval", "--recipe", recipe, f"eval.tasks=[{first}]", "--json").stdout)
    after = json.loads(ok("eval", "--recipe", recipe, f"eval.tasks=[{first}, {second}]", "--json").stdout)
    assert ran == ["first", "second"]
    assert after["base"]["tasks"]["first"] == before["base"]["tasks"]["first"]
    limited = json.loads(ok("eval", "--recipe", recipe, f"eval.tasks=[{first}]", "eval.limit=5", "--json").stdout)
    assert limited["base"]["tasks"]["first"]["samples"] == 5
    write_task(tmp_path / "tasks", "second", items=11)
    ok("eval", "--recipe", recipe, f"eval.tasks=[{second}]")
    assert ran == ["first", "second", "first", "second"]


def test_builtin_tasks_run_on_a_few_items(ok, lbllm, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", save_toy(tmp_path / "long", max_position_embeddings=512), tmp_path / "run")
    tasks = f"eval.tasks=[{', '.join(lm_tasks.builtin_tasks())}]"
    found = json.loads(ok("eval", "--recipe", recipe, tasks, "eval.limit=3", "--json").stdout)["base"]["tasks"]
    samples = {name: scores["samples"] for name, scores in found.items()}
    assert samples == {"lbllm_continuation": 3, "lbllm_last_word": 3, "lbllm_retrieval": 3}
    refused = lbllm("eval", "--recipe", recipe, tasks, "eval.num_fewshot=2")
    assert refused.exit_code == 2
    assert "lbllm_continuation is a task without any" in refused.stderr


def test_a_task_that_fails_leaves_the_finished_ones(lbllm, ok, recipe, tmp_path, monkeypatch):
    good, bad = write_task(tmp_path / "tasks", "good"), write_task(tmp_path / "tasks", "bad")
    # lm-eval looks at the first item alone before it runs.
    lines = [json.loads(line) for line in (tmp_path / "tasks/bad.jsonl").read_text().splitlines()]
    lines[5]["choices"] = None
    (tmp_path / "tasks/bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = lbllm("eval", "--recipe", recipe, f"eval.tasks=[{good}, {bad}]")
    assert result.exit_code == 1
    assert "bad failed on base" in result.stderr
    monkeypatch.setattr(lm_tasks, "run_task", lambda *_: pytest.fail("measured again"))
    assert json.loads(ok("eval", "--recipe", recipe, f"eval.tasks=[{good}]", "--json").stdout)["base"]["tasks"]["good"]


def test_a_signal_stops_a_task_and_leaves_no_model_behind(lbllm, ok, recipe, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    ok("ptq", "--recipe", recipe)
    good, second = write_task(tmp_path / "tasks", "good"), write_task(tmp_path / "tasks", "second")
    passes = []
    call = HFLM._model_call

    def interrupted(self, *given, **named):
        passes.append(None)
        signal.raise_signal(signal.SIGINT)
        return call(self, *given, **named)

    ok("eval", "--recipe", recipe, "eval.checkpoints=[ptq]", f"eval.tasks=[{good}]")
    monkeypatch.setattr(HFLM, "_model_call", interrupted)
    stopped = lbllm("eval", "--recipe", recipe, "eval.checkpoints=[ptq]", f"eval.tasks=[{good}, {second}]")
    assert stopped.exit_code == 130
    assert len(passes) == 1
    assert not list((tmp_path / "run/eval").glob("*.model*"))


def test_refused_before_a_weight_is_read(lbllm, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "export", lambda *_: pytest.fail("a model was written"))
    broken = tmp_path / "tasks" / "broken.yaml"
    write_task(tmp_path / "tasks", "nodata").with_suffix(".jsonl").unlink()
    broken.write_text("- a list")
    twins = [write_task(tmp_path / folder, "twin") for folder in ("tasks", "more")]
    cases = {
        "hellaswagg": ["no task hellaswagg", "hellaswag"],
        "builtin:continuatoin": ["builtin:continuatoin does not exist", "builtin:continuation"],
        str(tmp_path / "missing.yaml"): ["missing.yaml is not a file"],
        str(broken): ["broken.yaml cannot be read"],
        str(tmp_path / "tasks/nodata.yaml"): ["nodata.yaml cannot be loaded"],
        ", ".join(map(str, twins)): ["two tasks are called twin"],
        "piqa": ["the data of piqa cannot be read", "Hugging Face hub", "local data_files"],
    }
    result = lbllm("eval", "--recipe", recipe, f"eval.tasks=[{', '.join(cases)}]")
    assert result.exit_code == 2
    for parts in cases.values():
        for part in parts:
            assert part in result.stderr
    assert not (tmp_path / "run").exists()


def test_forecast_counts_the_whole_model_that_tasks_need(recipe):
    from lbllm_cli.evaluation.forecast import eval_need, whole_model_need
    from lbllm_cli.export.forecast import export_need
    from lbllm_cli.pipeline.plan import prepare
    from lbllm_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, [])
    model = prepare(loaded).model
    streamed = eval_need(loaded, model, {}, 2)
    whole = whole_model_need(loaded, model, streamed)
    assert whole.device >= 4 * model.count(list(model.shapes))
    assert whole.disk == streamed.disk + export_need(loaded, model).disk
    assert whole.ram >= streamed.ram


@pytest.mark.parametrize("limit", ["0", "-3", "1.5", "0.0", "yes"])
def test_limits_out_of_range(lbllm, recipe, limit):
    result = lbllm("eval", "--recipe", recipe, f"eval.limit={limit}")
    assert result.exit_code == 2
    assert "eval.limit" in result.stderr


def test_scores_of_groups_and_filters():
    found = {
        "results": {
            "mmlu": {"alias": "mmlu", "acc,none": 0.25, "acc_stderr,none": 0.01},
            "mmlu_law": {"acc,none": 0.2, "acc_stderr,none": "N/A"},
            "gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1, "sample_len": 7},
        },
        "n-samples": {"mmlu_law": {"original": 9, "effective": 4}, "gsm8k": {"original": 7, "effective": 7}},
        "n-shot": {"gsm8k": 5},
        "group_subtasks": {"mmlu": ["mmlu_law", "gsm8k"]},
    }
    assert lm_tasks.scores(found, "mmlu") == {"mmlu": {"acc": 0.25, "acc_stderr": 0.01, "samples": 11}}
    assert lm_tasks.scores(found, "gsm8k") == {
        "gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1, "samples": 7, "num_fewshot": 5}
    }
    assert set(lm_tasks.scores(found, "a tag")) == {"mmlu", "mmlu_law", "gsm8k"}
    # A group without a score as a whole has those of its tasks, and of groups in it.
    found["results"]["all"] = {"alias": "all", "name": "all"}
    found["group_subtasks"] = {"all": ["mmlu", "gsm8k"], "mmlu": ["mmlu_law"]}
    several = lm_tasks.scores(found, "all")
    assert {line: scored["samples"] for line, scored in several.items()} == {"mmlu": 4, "mmlu_law": 4, "gsm8k": 7}
    assert several["mmlu"]["acc"] == 0.25


def test_without_a_network_the_hub_is_asked_once(tmp_path, monkeypatch):
    import datasets
    from huggingface_hub import constants

    asked = []

    def unknown(host, *more, **options):
        asked.append(host)
        raise OSError(-2, "Name or service not known")

    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    hub._unreachable.cache_clear()
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("tried again"))
    tasks = [str(write_task(tmp_path, name, dataset_path=f"some/{name}", dataset_kwargs={})) for name in ("first", "second")]
    with pytest.raises(UsageError) as caught:
        lm_tasks.plan_tasks(tasks, None)
    for task in tasks:
        assert f"eval.tasks: {task} cannot be loaded: " in str(caught.value)
    host = constants.ENDPOINT.removeprefix("https://")
    assert str(caught.value).count(f"; there is no network, or no way to {host} in it (Name or service not known)") == 2
    assert asked == [host]
    assert not any(module.HF_HUB_OFFLINE for module in (constants, datasets.config))
    asked.clear()
    (task,) = lm_tasks.plan_tasks(["builtin:last_word"], None)
    assert task.name == "lbllm_last_word"
    assert asked == []
    # As it is run its data are read again.
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda **_: {"config": {}, "offline": constants.HF_HUB_OFFLINE})
    hub._unreachable.cache_clear()
    assert lm_tasks.run_task(SimpleNamespace(batch_size=1), task, None)["offline"]
    assert asked == []


def test_average_of_a_group():
    flat = {task: {"acc": 0.1 * i, "acc_stderr": 0.01, "samples": 10} for i, task in enumerate(lm_tasks.GROUPS["commonsense"][0])}
    found = lm_tasks.averages(["commonsense", "mmlu"], flat)
    assert found["commonsense"] == {
        "acc": pytest.approx(0.25), "acc_stderr": pytest.approx(0.01 / 6**0.5), "samples": 60,
    }  # fmt: skip
    assert list(found) == ["commonsense"]
    del flat["piqa"]
    assert lm_tasks.averages(["commonsense"], flat) == {}


_ODD = ["../../x", "/absent/x", "", ".", "..", "a/b", "a b", ["a", "b"], 7, None, {"task": "x"}, "x" * 200, "[/red]"]


@pytest.mark.parametrize("name", _ODD)
@pytest.mark.parametrize("key", ["task", "group"])
def test_a_task_is_no_path(lbllm, recipe, tmp_path, name, key):
    task = write_task(tmp_path / "tasks", "stories", **{"task": ["stories"] if key == "group" else "stories", key: name})
    for command in ("eval", "validate"):
        result = lbllm(command, "--recipe", recipe, f"eval.tasks=[{task}]")
        assert result.exit_code == 2
        assert f"{task}: `{key}` is" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cannot be read"),
        ("- a", "cannot be read"),
        ("{a: b}", "names no task"),
        ("task: x\ndataset_kwargs: [1]", "dataset_kwargs is list"),
        ("task: x\ndataset_kwargs: {data_files: {test: 7}}", "data_files holds '7'"),
        ("task: !function a.b", "cannot be read"),
        ("task: " + "[" * 100_000, "line 1: nested more than 32 levels deep"),
        ("task: x\ninclude: deep.yaml", "deep.yaml: line 1: nested more than 32 levels deep"),
        ("task: x\ninclude: [t.yaml, deep.yaml]", "deep.yaml: line 1: nested more than 32 levels deep"),
        ("task: x\ninclude: a_pipe", "a_pipe is a pipe; expected a file"),
        ("task: x\ninclude: nothing.yaml", "cannot be read"),
    ],
    ids=range(11),
)
def test_task_files_that_are_none(lbllm, recipe, tmp_path, text, expected):
    (tmp_path / "t.yaml").write_text(text)
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    os.mkfifo(tmp_path / "a_pipe")
    for command in ("eval", "validate"):
        result = lbllm(command, "--recipe", recipe, f"eval.tasks=[{tmp_path / 't.yaml'}]")
        assert result.exit_code == 2
        assert expected in result.stderr


def test_validate_looks_at_tasks(ok, lbllm, recipe, tmp_path):
    result = lbllm("validate", "--recipe", recipe, "eval.tasks=[builtin:nothing]")
    assert result.exit_code == 2
    assert "eval.tasks: builtin:nothing does not exist" in result.stderr
    # What else is wrong is said beside it.
    result = lbllm("validate", "--recipe", recipe, "eval.tasks=[builtin:nothing, none.yaml, piqua]", "model.path=nowhere/at/all")
    assert result.exit_code == 2
    for part in ("nowhere/at/all", "builtin:nothing does not exist", "none.yaml is not a file", "lm-eval has no task piqua"):
        assert part in result.stderr
    write_task(tmp_path / "tasks", "nodata").with_suffix(".jsonl").unlink()
    nodata = f"eval.tasks=[{tmp_path / 'tasks/nodata.yaml'}]"
    result = lbllm("validate", "--recipe", recipe, nodata, "data.training.source=none.txt")
    assert result.exit_code == 2
    for part in ("source none.txt: no such file", "nodata.yaml cannot be loaded"):
        assert part in result.stderr
    task = write_task(tmp_path / "tasks", "stories")
    without = json.loads(ok("validate", "--recipe", recipe, "--json").stdout)["forecast_bytes"]["eval"]
    found = json.loads(ok("validate", "--recipe", recipe, f"eval.tasks=[{task}]", "--json").stdout)["forecast_bytes"]["eval"]
    # A stage is written as an export for them.
    assert found["disk"] > without["disk"]


PATTERNS = {
    "one name": {"data_files": {"test": "parts/a.jsonl"}},
    "a star": {"data_files": {"test": "parts/*.jsonl"}},
    "a class": {"data_files": {"test": "parts/[a-b].jsonl"}},
    "any depth": {"data_files": {"test": "**/*.jsonl"}},
    "all below": {"data_files": {"test": "parts/**"}},
    "a list": {"data_files": {"test": ["parts/a*.jsonl", "parts/b*.jsonl"]}},
    "a folder": {"data_dir": "parts"},
    "a dataset": "parts",
    "a folder and names": {"data_dir": "parts", "data_files": {"test": "*.jsonl"}},
}


@pytest.mark.parametrize("keywords", PATTERNS.values(), ids=PATTERNS)
def test_a_task_is_known_by_the_content_of_its_data(tmp_path, monkeypatch, keywords):
    folder = tmp_path / "tasks"
    write_task(folder, "a")
    (folder / "parts").mkdir()
    for name in ("a", "b"):
        (folder / "parts" / f"{name}.jsonl").write_text((folder / "a.jsonl").read_text())
    (folder / "a.jsonl").unlink()
    task = {
        "task": "stories",
        **TASK,
        **({"dataset_kwargs": keywords} if isinstance(keywords, dict) else {"dataset_path": keywords}),
    }
    if keywords in ("parts", {"data_dir": "parts"}):
        task["test_split"] = "train"  # a folder's files without a split are of this one
    (folder / "t.yaml").write_text(json.dumps(task))
    monkeypatch.chdir(tmp_path)

    def identity():
        return lm_tasks.plan_tasks([str(folder / "t.yaml")], None)[0].identity

    before = identity()
    assert identity() == before
    for name in ("a",) if keywords == PATTERNS["one name"] else ("a", "b"):
        path = folder / "parts" / f"{name}.jsonl"
        path.write_text(path.read_text().replace("Chapter 3", "Chapter 9"))
        after = identity()
        assert after != before, name
        before = after
    monkeypatch.chdir(folder)
    assert identity() == before, "wherever the command runs"


def test_names_of_metrics_are_no_markup_of_the_table(ok, recipe, tmp_path, monkeypatch):
    task = write_task(tmp_path / "tasks", "stories")
    odd = {"[/b]": 0.5, "[red]acc": 0.25}
    monkeypatch.setattr(lm_tasks, "scores", lambda found, name: {name: {**odd, "samples": 12}})
    table = ok("eval", "--recipe", recipe, f"eval.tasks=[{task}]").stdout
    assert "stories, [/b]" in table
    assert "stories, [red]acc" in table


@pytest.mark.parametrize(("spoil", "message"), [("missing", "lacks 1 tensors, first model.norm.weight"), ("nan", "holds NaN")])
def test_a_dense_folder_with_spoiled_tensors_is_not_opened(toy, spoil, message):
    tensors = load_file(toy / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    if spoil == "nan":
        tensors["model.norm.weight"] = norm * torch.nan
    save_file(tensors, toy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=message):
        lm_tasks.open_lm(toy, torch.float32, torch.device("cpu"), 1, False)
