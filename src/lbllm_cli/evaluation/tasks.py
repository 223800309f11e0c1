"""lm-eval tasks: which ones a recipe means, whether they can run, and their scores on a model folder.

lm-eval is imported inside functions: it takes seconds.
"""

import difflib
import json
import math
import sys
import warnings
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lbllm_cli.core.errors import UsageError, reason
from lbllm_cli.data.hub import at_once
from lbllm_cli.evaluation.task_files import BUILTIN, builtin_tasks, identity_of, local_spec, name_of
from lbllm_cli.models.whole_folder import check_folder, check_loaded
from lbllm_cli.runtime.checks import refusing

# Groups of tasks as papers on low-bit models report them, with the examples in context that they use.
GROUPS: dict[str, tuple[tuple[str, ...], int]] = {
    "commonsense": (("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande"), 0),
    "mmlu": (("mmlu",), 5),
    "gsm8k": (("gsm8k",), 5),
}


@dataclass(frozen=True)
class Task:
    """One lm-eval task, or group of tasks, as it will be run.

    name: lm-eval's. spec: what lm-eval is given, a name or a configuration. num_fewshot: examples in context, None for the
    task's own number. identity: what scores depend on beside the model. bundled: its text comes with lbllm.
    """

    name: str
    spec: Any
    num_fewshot: int | None
    identity: dict[str, Any] = field(default_factory=dict)
    bundled: bool = False


def plan_tasks(names: list[str], num_fewshot: int | None) -> list[Task]:
    """The tasks behind `eval.tasks`, each once, their data read: what is wrong with one is known before a model is loaded.

    num_fewshot: for all of them, None for the group's or the task's own. Raises UsageError with every problem found.
    """
    expanded = {name: (GROUPS[key][1] if key in GROUPS else None) for key in names for name in GROUPS.get(key, ((key,),))[0]}
    tasks: list[Task] = []
    problems: list[str] = []
    if not expanded:
        return tasks
    with at_once(local=all(name.startswith(BUILTIN) for name in expanded)) as away:
        for name, usual in expanded.items():
            try:
                tasks.append(_plan_task(name, usual if num_fewshot is None else num_fewshot, num_fewshot, away))
            except UsageError as error:
                problems.append(str(error))
    counts = Counter(task.name for task in tasks)
    problems += [f"eval.tasks: two tasks are called {name}; rename one" for name, count in counts.items() if count > 1]
    if problems:
        raise UsageError("\n".join(problems))
    return tasks


@cache
def _manager(defaults: bool) -> Any:
    """lm-eval's index of tasks; its own ones are in it only where one is asked for, for that takes ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _is_local(name: str) -> bool:
    return name.startswith(BUILTIN) or name.endswith((".yaml", ".yml"))


def _plan_task(name: str, shots: int | None, fixed: int | None, away: str | None) -> Task:
    """away: why the hub cannot be reached, None where it can."""
    manager = _manager(not _is_local(name))
    spec: Any = local_spec(name) if _is_local(name) else name
    if not _is_local(name) and name not in manager.all_tasks:
        known = [*GROUPS, *builtin_tasks(), *manager.all_tasks]
        nearest = difflib.get_close_matches(name, known, 3) or [*GROUPS, *builtin_tasks()]
        raise UsageError(f"eval.tasks: lm-eval has no task {name}; nearest: {', '.join(nearest)}; or give a task's YAML file")
    try:
        loaded = manager.load([spec])["tasks"]
    except Exception as error:  # the hub's, the network's, dataset builders' and task authors' errors have no common base
        raise UsageError(_unreadable(name, manager, reason(error) if away is None else f"{reason(error)}; {away}")) from None
    for task in loaded.values():
        if fixed and task.get_config("num_fewshot") == 0:
            raise UsageError(f"eval.num_fewshot: {fixed} examples, but {task.config.task} is a task without any; leave it out")
    identity = {leaf: identity_of(task) for leaf, task in sorted(loaded.items())}
    return Task(name_of(spec, name) if isinstance(spec, dict) else name, spec, shots, identity, name.startswith(BUILTIN))


def _unreadable(name: str, manager: Any, why: str) -> str:
    if _is_local(name):
        return f"eval.tasks: {name} cannot be loaded: {why}"
    entry = manager.task_index[name]
    dataset = (entry.cfg or {}).get("dataset_path", "its dataset")
    return (
        f"eval.tasks: the data of {name} cannot be read: {why}. lm-eval takes {dataset} from the Hugging Face hub;\n"
        "load it once where there is a network (it stays in HF_HOME), or give a YAML file that says `include:` and the task's\n"
        "own YAML, and names local data_files"
    )


def open_lm(folder: Path, dtype: torch.dtype, device: torch.device, batch_size: int, trust_remote_code: bool) -> Any:
    """lm-eval's own model object for a folder, packed or not, loaded as its command line loads it.

    Raises UsageError for a folder that cannot be loaded.
    """
    from lm_eval.models.huggingface import HFLM

    import lbllm_cli.hf  # noqa: F401 - packed folders

    attention = check_folder(folder, trust_remote_code).get_text_config()._attn_implementation
    chosen = {} if attention is None else {"attn_implementation": attention}
    name = str(dtype).removeprefix("torch.")
    with warnings.catch_warnings(), refusing(folder):
        # It reads a packed folder's quantization_config and passes it on, of which transformers then warns.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        lm = HFLM(
            pretrained=str(folder), dtype=name, device=str(device), batch_size=batch_size, trust_remote_code=trust_remote_code,
            **chosen,
        )  # fmt: skip
    check_loaded(folder, lm.model)
    return lm


def run_task(lm: Any, task: Task, limit: float | None) -> dict[str, Any]:
    """One task on an opened model: lm-eval's results as it would write them to its JSON.

    limit: documents of each task, below 1 a share of them; None for all.
    """
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.utils import handle_non_serializable

    # It would ask git for the commit of the folder that the command happens to run in, and git complains outside of one.
    evaluator.get_git_commit_hash = lambda: None
    manager = _manager(not isinstance(task.spec, dict))
    with redirect_stdout(sys.stderr), at_once(local=task.bundled):  # it says there that it bootstraps; stdout is for results
        found = lm_eval.simple_evaluate(
            model=lm, tasks=[task.spec], num_fewshot=task.num_fewshot, limit=limit, task_manager=manager, log_samples=False
        )
    found["config"]["batch_size"] = lm.batch_size  # it records its argument, which does not reach an opened model
    return json.loads(json.dumps(found, default=handle_non_serializable))


def scores(found: dict[str, Any], name: str) -> dict[str, dict[str, float]]:
    """Flat scores of lm-eval's results: {"piqa": {"acc": 0.68, "acc_stderr": 0.01, "samples": 1838}}; of a group, its own line,
    or those of its tasks where it has no score as a whole.

    A metric keeps the name of its filter where that is not lm-eval's `none`: "exact_match,strict-match".
    """
    leaves = {leaf: counts["effective"] for leaf, counts in found["n-samples"].items()}
    lines = {
        line: {key.removesuffix(",none"): value for key, value in facts.items() if "," in key and _is_number(value)}
        for line, facts in found["results"].items()
    }
    flat: dict[str, dict[str, float]] = {}
    for line in [name] if lines.get(name) else [line for line, values in lines.items() if values or line in leaves]:
        values = lines[line]
        shots = {"num_fewshot": found["n-shot"][line]} if line in found.get("n-shot", {}) else {}
        flat[line] = {**values, "samples": sum(leaves[leaf] for leaf in _leaves(found, line)), **shots}
    return flat


def _leaves(found: dict[str, Any], line: str) -> set[str]:
    """The tasks that a line of results is of: itself, or those of a group, and of groups in it."""
    if line in found["n-samples"]:
        return {line}
    parts = found.get("group_subtasks", {}).get(line, [])
    return {leaf for part in parts for leaf in _leaves(found, part)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def averages(names: list[str], flat: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Means over the tasks of each group named that has several, all of which have scores: of `acc`, with the standard error of
    the mean.
    """
    found = {}
    for group in names:
        wanted = GROUPS.get(group, ((), 0))[0]
        members = [flat[task] for task in wanted if task in flat]
        if len(members) == len(wanted) > 1:
            errors = [member.get("acc_stderr", 0.0) for member in members]
            found[group] = {
                "acc": sum(member["acc"] for member in members) / len(members),
                "acc_stderr": math.sqrt(sum(error**2 for error in errors)) / len(members),
                "samples": sum(member["samples"] for member in members),
            }
    return found


def version() -> str:
    """lm-eval's."""
    return metadata.version("lm_eval")
