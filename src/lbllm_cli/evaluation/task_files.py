"""Tasks that lie in files: their YAML, the data beside it, and what both are known by.

lm-eval is imported inside functions: it takes seconds.
"""

import glob
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lbllm_cli.core import files, strict_yaml
from lbllm_cli.core.errors import UsageError, reason
from lbllm_cli.core.fingerprint import fingerprint

BUILTIN = "builtin:"
# A task's YAML of this many bytes is none.
_TASK_BYTES = 1 << 20
# lm-eval's own names have brackets among them, and no slashes.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+()-]{0,149}")


def builtin_tasks() -> list[str]:
    """Tasks that come with lbllm, as a recipe writes them."""
    names = (item.name for item in (resources.files("lbllm_cli.data") / "tasks").iterdir())
    return sorted(BUILTIN + name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def name_of(spec: dict[str, Any], name: str) -> str:
    """What a task's YAML calls it: files are named after it."""
    key = "group" if "group" in spec else "task"
    found = spec[key]
    if not isinstance(found, str) or not _NAME.fullmatch(found):
        expected = "a name of letters, digits and ._+()- that begins with a letter or digit, of at most 150 characters"
        raise UsageError(f"eval.tasks: {name}: `{key}` is {str(found)[:100]!r}; expected {expected}")
    return found


def local_spec(name: str) -> dict[str, Any]:
    """A task's YAML with its data files beside it: lm-eval would look for them where it runs."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if name.startswith(BUILTIN):
        if name not in builtin_tasks():
            raise UsageError(f"eval.tasks: {name} does not exist; there are {', '.join(builtin_tasks())}")
        path = Path(str(resources.files("lbllm_cli.data") / "tasks" / f"{name.removeprefix(BUILTIN)}.yaml"))
    else:
        path = files.user_path(name, "eval.tasks")
    if not path.is_file():
        raise UsageError(f"eval.tasks: {path} is not a file")
    _check_files(path)
    try:
        spec = load_yaml(path)
    except Exception as error:  # YAML's errors, and those of functions that it names
        raise UsageError(f"eval.tasks: {path} cannot be read: {reason(error)}") from None
    if not isinstance(spec, dict) or "task" not in spec:
        raise UsageError(f"eval.tasks: {path} names no task; expected a key `task`")
    name_of(spec, name)
    keywords = spec.get("dataset_kwargs") or {}
    if not isinstance(keywords, dict):
        raise UsageError(f"eval.tasks: {path}: dataset_kwargs is {type(keywords).__name__}, expected a mapping")
    for key in ("data_files", "data_dir"):
        if strange := [leaf for leaf in _leaves(keywords.get(key)) if not isinstance(leaf, str)]:
            raise UsageError(f"eval.tasks: {path}: {key} holds {str(strange[0])[:100]!r}, expected paths")
    folder = path.absolute().parent
    if isinstance(spec.get("dataset_path"), str) and (folder / spec["dataset_path"]).is_dir():
        spec["dataset_path"] = str(folder / spec["dataset_path"])
    elif keywords:
        spec["dataset_kwargs"] = _beside(keywords, folder)
    return spec


def _beside(keywords: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of `load_dataset` whose paths are those of a folder. Names of files are below `data_dir` where both are given."""
    if (data_dir := keywords.get("data_dir")) is None:
        return {**keywords, **({"data_files": _absolute(keywords["data_files"], folder)} if "data_files" in keywords else {})}
    below = _absolute(data_dir, folder)
    if keywords.get("data_files") is None or "://" in below:
        return {**keywords, "data_dir": below}
    return {**keywords, "data_dir": None, "data_files": _absolute(keywords["data_files"], Path(below))}


def _check_files(path: Path) -> None:
    """Reads a task's YAML, and those that it includes, as far as lm-eval's reader needs it. Raises UsageError naming the file."""
    left, seen = [path], set[Path]()
    while left:
        file = left.pop()
        if file in seen:
            continue
        seen.add(file)
        node = strict_yaml.outline(files.read_text(file, _TASK_BYTES), str(file))
        for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
            if key.value == "include":
                names = value.value if isinstance(value, yaml.SequenceNode) else [value]
                included = (file.parent / name.value for name in names if isinstance(name, yaml.ScalarNode))
                left += [other for other in included if other.exists()]


def _absolute(data_files: Any, folder: Path) -> Any:
    if isinstance(data_files, dict):
        return {key: _absolute(value, folder) for key, value in data_files.items()}
    if isinstance(data_files, list):
        return [_absolute(value, folder) for value in data_files]
    return data_files if data_files is None or "://" in data_files else str(folder / data_files)


def identity_of(task: Any) -> str:
    """Hash of a task's configuration and of the local files that it reads."""
    from lm_eval.utils import handle_non_serializable

    config = task.dump_config()
    config.pop("metadata", None)  # where its YAML lies, and its version
    keywords = dict(config.pop("dataset_kwargs", None) or {})
    read = [file for pattern in _leaves(keywords.pop("data_files", None)) for file in _matching(str(pattern))]
    for folder in (config.get("dataset_path"), keywords.get("data_dir")):
        if folder is not None and Path(folder).is_dir():
            read += sorted(map(str, Path(folder).rglob("*")))
    hashes = [files.sha256(Path(file)) for file in read if Path(file).is_file()]
    whole = {"config": config, "keywords": keywords, "files": hashes, "version": task.VERSION}
    return fingerprint(json.loads(json.dumps(whole, default=handle_non_serializable)))


def _matching(pattern: str) -> list[str]:
    """Local files that one of `data_files` stands for: a path, or a pattern as `datasets` reads them."""
    return [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value
