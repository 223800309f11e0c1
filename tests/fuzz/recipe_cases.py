"""Recipes and overrides that are wrong or odd in their values. `recipe_texts` has those that are so as texts."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import recipe_texts
import yaml
from bases import LOCK, RECIPE, stage_writes
from mutate import LONE, ODD, leaves, mutate_tree
from promise import Case
from recipe_texts import read_by, whole_tree, write_tree


def _one(work: Path, rng: random.Random) -> Case:
    values = whole_tree(work)
    what = mutate_tree(values, rng)
    write_tree(work, values)
    return read_by(what, rng)


def _several(work: Path, rng: random.Random) -> Case:
    values = whole_tree(work)
    what = [mutate_tree(values, rng) for _ in range(rng.randint(2, 4))]
    write_tree(work, values)
    return read_by("; ".join(what), rng)


def _run_for_real(work: Path, rng: random.Random) -> Case:
    values = whole_tree(work)
    sections = ("runtime", "data", "ptq", "recipe_version")
    what = mutate_tree(values, rng, [path for path in leaves(values) if path[0] in sections])
    write_tree(work, values)
    return Case(f"ptq: {what}", ["ptq", "--recipe", RECIPE], (*stage_writes("ptq"), "work/run/generated*"))


def _number(work: Path, rng: random.Random) -> Case:
    key, number = rng.choice(
        [
            ("runtime.seed", 2**63), ("runtime.seed", 2**64), ("runtime.seed", 2**63 - 1), ("runtime.seed", 10**400),
            ("data.calibration.sequences", 10**29), ("data.calibration.length", 2**62), ("data.training.sequences", 2**40),
            ("data.calibration.source", [{"source": "builtin:calibration", "weight": float("inf")}]),
            ("data.calibration.source", [{"source": "chapter.txt", "weight": 5e-324}, "builtin:calibration"]),
            ("data.calibration.source", [{"source": "chapter.txt", "weight": 1e308}, {"source": "chapter.txt", "weight": 1e308}]),
            ("data.calibration.source", [{"source": "chapter.txt", "weight": float("nan")}]),
            ("data.calibration.source", "chapter.txt"), ("runtime.save_minutes", float("inf")), ("runtime.batch_size", 2**70),
            ("data.evaluation", [{"name": "x", "source": "chapter.txt", "length": 32, "segments": 10**29}]),
            ("data.evaluation", [{"name": "x", "source": "chapter.txt", "length": 10**29}]),
            ("data.evaluation", [{"name": "x", "source": [{"source": "chapter.txt", "weight": 5e-324}], "segments": 3}]),
            ("export.shard_gb", float("inf")), ("export.shard_gb", float("nan")), ("export.shard_gb", 1e308),
            ("ptq.damping", float("nan")), ("ptq.asymmetric", float("nan")), ("distill.clip", float("inf")),
            ("distill.lr_weights", 5e-324), ("act_calib.temperature", [5e-324, 5e-324]), ("eval.limit", 5e-324),
            ("eval.limit", 2**70),
            ("distill.max_skipped", 2**70), ("distill.end_to_end.skip", 2**70), ("distill.end_to_end.sequences", 2**70),
            ("distill.polarise", float("inf")), ("act_calib.sequences", 2**70), ("distill.micro_batch_size", 2**70),
        ]
    )  # fmt: skip
    command = rng.choice([["validate"], ["ptq"], ["ptq", "--dry-run"], ["distill", "--dry-run"], ["eval", "--dry-run"]])
    value = yaml.safe_dump(number, default_flow_style=True).removesuffix("...\n").strip()
    return Case(f"{key}={value}", [*command, "--recipe", RECIPE, f"{key}={value}"], stage_writes("ptq"))


def _override(work: Path, rng: random.Random) -> Case:
    """Overrides that are none, or of a key that is not there, or an odd value at any key."""
    values = whole_tree(work)
    texts = [
        "", "=", "x", "a.b", ".=1", "a..b=1", "model.path.x=1", "ptq.group_size=[", "ptq={", "=1", "1=1", "ptq.group_size==1",
        "x" * 9000,
        "data.evaluation.0.name=x", "data.evaluation[0]=x", "model.path=", "model=", "output=null", "\n", "é=1",
        "data.calibration.source.x=1",
        "data.calibration.source.weight=.nan", "ptq.group_size=!!python/none", "recipe_version=2", "model.path='\\0'",
        "a." * 3000 + "b=1",
        'model.path="\\0"', 'model.path="\\uD800"', 'data.evaluation=[{name: "\\uD800", source: chapter.txt}]',
        "ptq.group_size=16=16",
        "data.training.source.source.source=x", "eval.tasks=[../../x.yaml]", "eval.tasks=[/dev/zero]", "eval.tasks=[model]",
        "model=[a",
    ]  # fmt: skip
    if rng.random() < 0.4:
        return read_by("override", rng, *rng.sample(texts, rng.choice([1, 1, 3])))
    path = rng.choice([path for path in leaves(values) if all(isinstance(key, str) for key in path)])
    value = yaml.safe_dump(rng.choice(ODD), default_flow_style=True, width=10**9).removesuffix("...\n").strip()
    text = f"{'.'.join(path)}={value}"
    return read_by(f"override {text[:60]!r}", rng, text)


_PATHS = (
    "x" * 300, "x/" * 3000, "~nosuchuser/x", "~nosuchuser", "\x00", "a\x00b", LONE, "\n", "model/config.json", "chapter.txt",
    "chapter.txt/x",
    "pipe", "loop", "nothing", "/dev/zero", "/dev/null", "/proc/self/mem", "model/..", " ", "-", "--help", "hub:", "hub:x/y",
    "x/y", "x/y/z",
    "builtin:", "builtin:x", "builtin:calibration/../x", "generate:", "generate:x", "pipe.txt", "pipe.jsonl", "folder.txt",
    "loop.parquet",
    "pipe.safetensors", "https://nowhere.invalid/x", "model", "empty.txt", "empty.parquet", "empty.safetensors", "empty.json",
    "c4", "ptb",
)  # fmt: skip


def _path(work: Path, rng: random.Random) -> Case:
    for name in ("pipe", "pipe.txt", "pipe.jsonl", "pipe.safetensors"):
        os.mkfifo(work / name)
    for name in ("loop", "loop.parquet"):
        (work / name).symlink_to(name)
    (work / "folder.txt").mkdir()
    for name in ("empty.txt", "empty.parquet", "empty.safetensors", "empty.json"):
        (work / name).touch()
    values, text = whole_tree(work), rng.choice(_PATHS)
    key = rng.choice(
        ["model.path", "data.calibration.source", "data.evaluation", "output.dir", "--recipe", "model.revision", "eval.tasks"]
    )
    if key == "--recipe":
        shown = text.replace("\x00", "").replace(LONE, "\udcff")
        return Case(f"--recipe {shown[:40]!r}", [rng.choice(["config", "ptq", "report"]), "--recipe", shown], LOCK, "refused")
    if key == "data.evaluation":
        values["data"]["evaluation"] = [{"name": "x", "source": text, "length": 32}]
    elif key == "data.calibration.source":
        values["data"]["calibration"]["source"] = text
    else:
        section, name = key.split(".")
        # Only a file's name: where it may be one of lm-eval's own, the index of those takes ten seconds to read.
        values[section][name] = [f"{text}.yaml"] if name == "tasks" else text
    write_tree(work, values)
    command = rng.choice(
        [["validate"], ["ptq", "--dry-run"], ["eval", "--dry-run"], ["report"], ["export"], ["distill"], ["eval"]]
    )
    made: tuple[str, ...] = ()
    if key == "output.dir" and text not in ("model", "model/.."):
        steps = text.split("/")[:3]
        made = tuple(f"work/{'/'.join(steps[: count + 1])}" for count in range(len(steps)))
        made += (f"{made[-1]}/*",)
    own = ("work/run/eval*", "work/run/generated*")
    return Case(f"{key}: {text[:40]!r}", [*command, "--recipe", RECIPE], (*LOCK, *made, *own))


def _environment(work: Path, rng: random.Random) -> Case:
    values = whole_tree(work)
    texts = [
        "${env:NOWHERE}", "${env:ODD}", "${env:ODD:-x}", "${env:NOWHERE:-[[[[}", "${env:NOWHERE:-}", "${env:}", "${env:1x}",
        "${env:A:-${env:B}}",
        "${recipe_dir}", "${recipe_dir}/${env:ODD}", "${env:ODD}${env:ODD}", "${env:NOWHERE:-*x}", "${env:NOWHERE:-!!bool 7}",
        "${x}", "${",
    ]  # fmt: skip
    odd = rng.choice(
        [
            "[" * 3000,
            "*x",
            "&a [*a]",
            "!!bool 7",
            "1e999",
            "{a: 1}",
            "9" * 5000,
            "",
            "x\ny",
            "${env:ODD}",
            "\udcff",
            "# x",
            "null",
        ]
    )
    path = rng.choice([path for path in leaves(values) if path[0] not in ("output", "model") or len(path) > 1])
    owner: Any = values
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = rng.choice(texts)
    write_tree(work, values)
    return read_by(f"environment {path}: {owner[path[-1]]}", rng, env={"ODD": odd})


def _overlap(work: Path, rng: random.Random) -> Case:
    """What a command would write lies over what it reads, or over something of the user's."""
    how = rng.randrange(9)
    overrides: list[str] = []
    if how == 0:
        overrides = ["output.dir=model"]
    elif how == 1:
        (work / "link").symlink_to("model")
        overrides = ["output.dir=link"]
    elif how == 2:
        (work / "model").rename(work / "ptq")
        overrides = ["output.dir=.", "model.path=ptq"]
    elif how == 3:
        (work / "run").mkdir()
        (work / "model").rename(work / "run" / "ptq")
        overrides = ["model.path=run/ptq"]
    elif how == 4:
        (work / "run" / "ptq").mkdir(parents=True)
        shutil.move(work / "chapter.txt", work / "run" / "ptq" / "chapter.txt")
        overrides = [f"data.{part}.source=run/ptq/chapter.txt" for part in ("calibration", "training")]
    else:
        name = ("ptq", "ptq.partial", "ptq.replaced", "ptq")[how - 5]
        (work / "run" / name).mkdir(parents=True)
        (work / "run" / name / "thesis.tex").write_text("Mine.\n")
        if how == 8:
            (work / "elsewhere").mkdir()
            (work / "run" / name).rename(work / "elsewhere" / name)
            (work / "run" / name).symlink_to("../elsewhere/ptq")
    force = ["--force"] if rng.random() < 0.5 else []
    return Case(f"overlap {how} {force}", ["ptq", "--recipe", RECIPE, *force, *overrides], LOCK, "refused")


def _options(work: Path, rng: random.Random) -> Case:
    line = rng.choice(
        [
            ["distill", "--only", "x"], ["ptq", "--nothing"], ["nothing"], ["ptq"], ["eval", "--json", "--json"],
            ["ptq", "--force=1"],
            ["distill", "--only", "end-to-end", "distill.end_to_end=null"], ["act-calib", "--only", "blocks"],
            ["report", "--dry-run"],
            ["export", "export.checkpoint=distill"], ["eval", "eval.checkpoints=[export]"],
            ["eval", "eval.checkpoints=[act-calib]"],
            ["ptq", "--recipe"], ["config", "-r", RECIPE, "-r", "x"], ["report", "output.dir=model"], ["report", "output.dir=."],
            ["generate"],
            ["distill"], ["act-calib"], ["act-calib", "act_calib.parent=ptq"], ["export"], ["report"],
        ]
    )  # fmt: skip
    given = any(word in ("-r", "--recipe", "nothing", "generate") for word in line) or line == ["ptq"]
    return Case(f"options {line}", [*line, *([] if given else ["--recipe", RECIPE])], (*LOCK, "work/run/eval*"))


KINDS = (
    _one, recipe_texts.tag, recipe_texts.alias, _number, _override, _path, _overlap, recipe_texts.deep, recipe_texts.encoding,
    _several, _run_for_real, _environment, recipe_texts.keys, recipe_texts.spoiled, _options, _path, recipe_texts.other_bytes,
    _number,
)  # fmt: skip
