"""Output folders of a run in which records, logs or weights are not what a command wrote."""

import json
import os
import random
from pathlib import Path
from typing import Any

from bases import LOCK, RECIPE, STAGES, stage_writes
from mutate import ODD, dump_json, load_json, mutate_bytes, mutate_tree, nested, spoil_file
from promise import Case
from weight_files import harm_tensor, scale_values, spoil_data, spoil_header

from lbllm_cli.recipe.training import ActCalib, ActEndToEnd, Distill, DistillEndToEnd

# Stages of the base, all of them complete, and one that was stopped after its first block.
_STOPPED = ("distill.partial",)
_EVAL = ("work/run/eval", "work/run/eval/*")
_EXPORT = tuple(f"work/run/export{tail}" for tail in ("", "/*", ".partial", ".partial/*", ".replaced", ".replaced/*"))
_REPORT = ("work/run/report.*",)


# What a command that ended with 0 must have left, whatever lay there before.
_MADE = {"ptq": "ptq/block_*", "distill": "distill/block_*", "export": "export/*.safetensors", "act-calib": "act-calib/block_*"}


def _command(rng: random.Random, stage: str = "") -> tuple[list[str], tuple[str, ...]]:
    """A command that reads the run, or goes on from `stage`, and what it may write."""
    choices: list[tuple[list[str], tuple[str, ...]]] = [
        (["report"], _REPORT),
        (["eval"], _EVAL),
        (["export"], _EXPORT),
        (["validate"], ()),
        (["ptq"], stage_writes("ptq")),
        (["distill"], stage_writes("distill", "distill-e2e")),
        (["distill", "--only", "end-to-end"], stage_writes("distill-e2e")),
        (["act-calib", "--only", "blocks"], stage_writes("act-calib")),
    ]
    own = stage.removesuffix("-e2e").removesuffix(".partial")
    going_on = [choice for choice in choices if choice[0][0] == own]
    line, writes = rng.choice(going_on if going_on and rng.random() < 0.5 else choices)
    if line[0] in ("ptq", "distill", "act-calib", "eval") and rng.random() < 0.2:
        line = [*line, rng.choice(["--force", "--dry-run"])]
    return [*line, "--recipe", RECIPE], (*LOCK, *writes)


def _case(kind: str, rng: random.Random, stage: str = "", outcome: Any = "any") -> Case:
    line, writes = _command(rng, stage)
    name = "distill-e2e" if "end-to-end" in line else line[0]
    made = _MADE.get(name, f"{name}/block_*")
    checked = () if "--dry-run" in line or line[0] in ("report", "eval", "validate") else (f"work/run/{made}",)
    return Case(f"{line[0]}: {kind}", line, writes, outcome, checked)


def _folder(work: Path, rng: random.Random) -> Path:
    return work / "run" / rng.choice([*STAGES, *_STOPPED, *_STOPPED])


def _record(folder: Path) -> Path:
    return folder / ("progress.json" if folder.suffix == ".partial" else "lbllm_stage.json")


def _manifest(work: Path, rng: random.Random) -> Case:
    folder = _folder(work, rng)
    values = load_json(_record(folder))
    what = mutate_tree(values, rng)
    dump_json(values, _record(folder))
    return _case(f"{folder.name} manifest, {what}", rng, folder.name)


def _manifest_top(work: Path, rng: random.Random) -> Case:
    """A key of the manifest's top takes an odd value: the inputs' many keys would leave these to chance."""
    folder = _folder(work, rng)
    values = load_json(_record(folder))
    key = rng.choice(list(values))
    values[key] = rng.choice([*ODD, [values[key]], str(values[key])])
    dump_json(values, _record(folder))
    return _case(f"{folder.name} manifest, {key} = {str(values[key])[:40]!r}", rng, folder.name)


def _file_names(work: Path, rng: random.Random) -> Case:
    """Names and hashes of a stage's files."""
    folder = _folder(work, rng)
    values = load_json(_record(folder))
    listed = values["files"]
    name = rng.choice(sorted(listed))
    how = rng.randrange(4)
    if how == 0:
        del listed[name]
    elif how == 1:
        listed[
            rng.choice(
                ["../../../home/precious.txt", "/etc/passwd", "", ".", "block_009.safetensors", "x" * 300, "a\x00b", "\ud800"]
            )
        ] = listed[name]
    elif how == 2:
        listed[name] = rng.choice([None, 7, [], {}, "", "x"])
    else:
        listed[rng.choice(["block_-01.safetensors", "block_000.safetensors ", "BLOCK_000.safetensors"])] = listed.pop(name)
    dump_json(values, _record(folder))
    return _case(f"{folder.name} files, {how}: {str(sorted(map(str, listed)))[:60]}", rng, folder.name)


def _json_file(work: Path, rng: random.Random) -> Case:
    """Another JSON file of the run: results, details, environment, an export's record, measurements that are kept."""
    names = sorted(path for path in (work / "run").rglob("*.json") if path.name not in ("lbllm_stage.json", "progress.json"))
    file = rng.choice(names)
    values = load_json(file)
    how = rng.randrange(3)
    if how == 0:
        what = f"{(other := rng.choice(ODD))!r}"[:40]
        dump_json(other, file)
    elif how == 1:
        what = "nested"
        file.write_text(nested(rng, *rng.choice([("[", "]"), ('{"a":', "}")])))
    else:
        what = mutate_tree(values, rng)
        dump_json(values, file)
    return _case(f"{file.relative_to(work / 'run')}: {what}", rng)


def _events(work: Path, rng: random.Random) -> Case:
    folder = _folder(work, rng)
    file = folder / "events.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    place = rng.randrange(len(lines))
    how = rng.randrange(3)
    if how == 0:
        lines[place] = rng.choice(
            [
                b"7\n",
                b"[]\n",
                b"null\n",
                b'{"block": "x"}\n',
                b'{"block": null}\n',
                b'{"block": []}\n',
                b'{"block": 1e999}\n',
                b"\xff\n",
                b'{"block": 7}\n',
                b'{"block": 0, "error": "x", "seconds": []}\n',
                b'{"step": {}}\n',
                nested(rng).encode() + b"\n",
                b'{"step": -1, "loss": null}\n',
                b"{\n",
            ]
        )
    elif how == 1:
        record = json.loads(lines[place])
        mutate_tree(record, rng)
        lines[place] = json.dumps(record).encode() + b"\n"
    else:
        lines[place] = mutate_bytes(lines[place], rng)[0]
    file.write_bytes(b"".join(lines))
    return _case(f"{folder.name} events: {lines[place][:60]!r}", rng, folder.name)


def _spoiled(work: Path, rng: random.Random) -> Case:
    """Any file of the run is gone, a folder, a pipe, or other bytes."""
    file = rng.choice(sorted(path for path in (work / "run").rglob("*") if path.is_file()))
    return _case(f"{file.parent.name}/{spoil_file(file, rng)}", rng, file.parent.name)


def _weights(work: Path, rng: random.Random) -> Case:
    """Weights of a complete stage that were changed since: whoever goes on from them, or measures them, refuses."""
    stage = rng.choice(STAGES)
    file = rng.choice(sorted((work / "run" / stage).glob("*.safetensors")))
    what = rng.choice([spoil_data, spoil_header, harm_tensor])(file, rng)
    line, writes = rng.choice([(["eval"], _EVAL), (["export", f"export.checkpoint={stage}"], _EXPORT)])
    line = [line[0], "--recipe", RECIPE, *line[1:]]
    return Case(f"{line[0]}: {stage}/{file.name}: {what}", line, (*LOCK, *writes), "refused")


def _weights_stopped(work: Path, rng: random.Random) -> Case:
    """What an unfinished stage goes on from."""
    folder = work / "run" / rng.choice(_STOPPED)
    file = rng.choice(sorted(folder.rglob("*.safetensors")))
    what = rng.choice([spoil_data, spoil_header, harm_tensor, scale_values])(file, rng)
    line = ["distill", "--only", "blocks", "--recipe", RECIPE]
    kind = f"distill: {folder.name}/{file.name}: {what}"
    return Case(kind, line, stage_writes("distill"), ends_as=(f"work/run/{_MADE['distill']}",))


def _foreign(work: Path, rng: random.Random) -> Case:
    """Files of the user's, or of another kind, in the folders of the run."""
    name = rng.choice(
        ["ptq", "distill", "distill-e2e", "ptq.partial", "ptq.replaced", "export", "eval", "export.partial", "export.replaced"]
    )
    folder = work / "run" / name
    folder.mkdir(exist_ok=True)
    (folder / "thesis.tex").write_text("Mine.\n")
    stage = name.split(".")[0]
    command = {"ptq": "ptq", "distill": "distill", "distill-e2e": "distill", "export": "export", "eval": "eval"}[stage]
    force = ["--force"] if rng.random() < 0.5 else []
    more = ["export.format=dense"] if command == "export" else []
    # Everything that is the command's own, the user's file aside: patterns have no other way to say so.
    writes = {"eval": _EVAL[:1], "export": ("work/run/export",)}.get(
        command, stage_writes("distill", "distill-e2e") if command == "distill" else ()
    )
    own = tuple(pattern for pattern in writes if not pattern.endswith("*"))
    inner = ("*.safetensors", "*.json", "*.jsonl", "*.png", "*.yaml", "*.md", "*/streams*", "*/lm-eval*", "*/measured*")
    return Case(
        f"{command} {force}: thesis in {name}",
        [command, *force, "--recipe", RECIPE, *more],
        (*LOCK, *own, *(f"work/run/{p}" for p in inner)),
    )


def _lock(work: Path, rng: random.Random) -> Case:
    file = work / "run" / ".lock"
    file.unlink(missing_ok=True)
    how = rng.choice(["folder", "pipe", "link", "binary", "loop"])
    if how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "link":
        file.symlink_to("../precious.txt")
    elif how == "loop":
        file.symlink_to(".lock")
    else:
        file.write_bytes(b"\xff" * 9)
    line, writes = _command(rng)
    return Case(f"{line[0]}: lock is {how}", line, writes)


def _other_files(work: Path, rng: random.Random) -> Case:
    """The folder of a stage is a file, or the other way round."""
    import shutil

    name = rng.choice(
        [*STAGES, *_STOPPED, "eval", "export", "report.md", "report.html", "eval/measured", "export.partial", "distill.replaced"]
    )
    path = work / "run" / name
    if path.is_dir():
        shutil.rmtree(path)
        how = rng.choice(["file", "link", "pipe", "loop"])
        {
            "file": path.touch,
            "link": lambda: path.symlink_to("nothing"),
            "pipe": lambda: os.mkfifo(path),
            "loop": lambda: path.symlink_to(path.name),
        }[how]()
    else:
        path.unlink(missing_ok=True)
        how = rng.choice(["folder", "file"])
        path.mkdir() if how == "folder" else path.touch()
    return _case(f"{name} is a {how}", rng, name)


# Values that the recipe allows, at the ends of what it does.
_KEYS: dict[str, list[Any]] = {
    "batch_size": [1, 4], "micro_batch_size": [1, 100], "epochs": [0, 1, 3], "warmup": [0, 0.99], "clip": [1e-30, 1e30],
    "held_out": [0.01, 0.8],
    "lr_levels": [1e-30, 1], "max_skipped": [0], "sequences": [2, 3], "lr_weights": [1e-30, 1], "loss": ["plain", "mixed"],
    "latent_margin": [0, 1], "dampening": [0, 0.99], "parametrisation": ["bitmap"], "polarise": [0, 1e30],
    "polarise_beta": [[1, 100]],
    "bits": [3, 5, 8], "kv_bits": [3, 5, 8], "granularity": ["token"], "form": ["uniform"], "kv_form": ["uniform"], "tables": [1],
    "lr_clip_factors": [1e-30, 1], "lr_knees": [1e-30, 1], "soft": [0, 0.99], "temperature": [[1e-30, 10], [10, 1e-30], 1e-3, 10],
    "lr_norms": [1e-30, 1], "next_token": [1], "recompute": ["always", "never"], "skip": [0, 7, 10**6],
    "source": ["generate:", "chapter.txt"],
    "train": [["levels"], ["weights", "levels"], ["scales"], ["norms"], ["clip_factors", "knees"], ["weights"]],
    "soft_knee": [[1e-30, 10]], "lr_bitmap": [1e-30, 1], "teacher": ["states", "model", "run", "chapter.txt", "run/distill"],
    "parent": ["ptq", "distill", "distill-e2e"],
}  # fmt: skip


def _keys(work: Path, rng: random.Random) -> Case:
    """A stage made anew with other keys, which train a toy into the ground or cannot be: any end but a traceback is one."""
    section, phase = rng.choice(["distill", "act_calib"]), rng.choice(["blocks", "end-to-end"])
    prefix = f"{section}.end_to_end" if phase == "end-to-end" else section
    kinds = {"distill": (Distill, DistillEndToEnd), "act_calib": (ActCalib, ActEndToEnd)}[section]
    known = kinds[phase == "end-to-end"].model_fields
    chosen = rng.sample(sorted(_KEYS.keys() & known), rng.choice([1, 2, 4]))
    words = [f"{prefix}.{key}={json.dumps(rng.choice(_KEYS[key]))}" for key in chosen]
    command = section.replace("_", "-")
    stage = command if phase == "blocks" else f"{command}-e2e"
    line = [command, "--only", phase, "--force", "--recipe", RECIPE, *words]
    writes = (*stage_writes(stage), "work/run/generated*", "work/states*")
    return Case(f"{stage}: {' '.join(words)}", line, writes)


KINDS = (
    _manifest_top, _keys, _events, _json_file, _spoiled, _file_names, _weights, _foreign, _manifest, _weights_stopped,
    _other_files, _lock, _spoiled, _json_file, _manifest_top, _keys,
)  # fmt: skip
