"""Every refusal that a user can meet at the command line: what leads to it, and the command that meets it.

Exit codes and messages stand in tests/assets/refusals.json. To write them anew, after a message was changed on purpose:

    LBLLM_RECORD=1 python -m pytest tests/integration/test_refusals.py

Cases are described by command lines and files alone, so that they hold whatever module a check is in. All paths are relative to
a folder of the case's own; see `build` for what lies there.
"""

import fcntl
import gzip
import json
import os
import re
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_toy, write_recipe
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

Setup = Callable[[pytest.MonkeyPatch], object]
Tensors = dict[str, torch.Tensor]

TOY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
LAST = {"sequences": 6, "held_out": 0.2, "epochs": 0}
SECTIONS: dict[str, Any] = {
    "data": {"evaluation": [{"name": "novels", "source": "chapter.txt", "length": 32, "segments": 2}]},
    "ptq": {"group_size": 16, "rounds": 0, "em_iterations": 1},
    "distill": {"epochs": 0, "held_out": 0.2, "end_to_end": {**LAST, "teacher": "teacher"}},
    "act_calib": {"epochs": 0, "held_out": 0.2, "tables": 1, "end_to_end": LAST},
}
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
DOWN, INPUT = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj.input"
# What a training that is stopped in its first block was run with.
TRAIN = ("distill.epochs=1", "runtime.save_minutes=0")


@dataclass(frozen=True)
class Case:
    """One refusal.

    line: the command line. setup: what is done to the case's folder, or to the machine, before. base: what lies in the folder,
    see `build`. library: pattern of what a library says in its own words, which another version of it says in others. kernels:
    what LBLLM_KERNELS is.
    """

    name: str
    line: tuple[str, ...]
    setup: Setup = lambda patch: None
    base: str = "toy"
    library: str = ""
    kernels: str | None = None


def build(run: Callable[..., Any], base: str) -> None:
    """Makes what cases begin with, in the current folder.

    toy: a model of two blocks, its recipe, its text. run: a run of every stage and an export of it as well. stopped: `ptq`, and a
    `distill` that was stopped in its first block. halted: a `ptq` that was stopped after its first block, with streams on disk.
    run: a command line in this process.
    """
    write_recipe(Path("recipe.yaml"), save_toy(Path("model"), **TOY), Path("run"), **SECTIONS)
    text = Path("chapter.txt")
    text.write_text(text.read_text(encoding="utf-8")[:4000], encoding="utf-8")  # as much as the recipe reads, and a little more

    def go(code: int, *line: str) -> None:
        result = run(line[0], "--recipe", "recipe.yaml", *line[1:])
        assert result.exit_code == code, result.stderr

    if base == "run":
        for command in ("ptq", "distill", "act-calib", "export"):
            go(0, command)
    if base == "stopped":
        go(0, "ptq")
        with pytest.MonkeyPatch.context() as patch:
            replacing("training.safetensors", stop(signal.SIGTERM), 2)(patch)
            go(130, "distill", "--only", "blocks", *TRAIN)
    if base == "halted":
        with pytest.MonkeyPatch.context() as patch:
            replacing("progress.json", stop(signal.SIGTERM), 2)(patch)
            go(130, "ptq", "runtime.streams=disk")


def message(stderr: str, folder: Path, library: str) -> str:
    """The message in what a command wrote, without lines about progress before it, and what differs from machine to machine."""
    # The frame that typer draws around what it refuses.
    text = re.sub(r"[^\S\n]*[│╭╮╰╯─]+[^\S\n]*", "", stderr)
    # How typer says what a command takes is not recorded.
    found = re.search(r"^(lbllm: |Error$)", text, re.MULTILINE)
    text = text[found.start() :] if found else text
    text = text.replace(str(folder.resolve()), "<tmp>").replace(str(folder), "<tmp>")
    text = re.sub(r"\b(?:[0-9a-f]{64}|[0-9a-f]{16}|[0-9a-f]{12})\b", "<hash>", text)
    text = "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
    return re.sub(library, "<library>", text) if library else text


# What is done to a case's folder.


def both(*setups: Setup) -> Setup:
    """One after the other."""
    return lambda patch: [setup(patch) for setup in setups]


def write(name: str, content: str | bytes) -> Setup:
    """A file."""

    def setup(_: pytest.MonkeyPatch) -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return setup


def folder(name: str) -> Setup:
    return lambda patch: Path(name).mkdir(parents=True)


def pipe(name: str) -> Setup:
    return lambda patch: (Path(name).unlink(missing_ok=True), os.mkfifo(name))


def link(name: str, target: str) -> Setup:
    return lambda patch: (Path(name).parent.mkdir(parents=True, exist_ok=True), Path(name).symlink_to(target))


def remove(name: str) -> Setup:
    return lambda patch: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def cut(name: str, size: int) -> Setup:
    """A file loses its last bytes."""
    return lambda patch: Path(name).write_bytes(Path(name).read_bytes()[:-size])


def flip(name: str) -> Setup:
    """A file's last byte is another."""

    def setup(_: pytest.MonkeyPatch) -> None:
        content = bytearray(Path(name).read_bytes())
        content[-1] ^= 1
        Path(name).write_bytes(content)

    return setup


def rewrite(name: str, **changes: Any) -> Setup:
    """Values of a JSON file."""

    def setup(_: pytest.MonkeyPatch) -> None:
        values = json.loads(Path(name).read_text()) if Path(name).exists() else {}
        Path(name).write_text(json.dumps({**values, **changes}))

    return setup


def alter(name: str, key: str, **changes: Any) -> Setup:
    """Values of an object in a JSON file; None takes one out."""

    def setup(_: pytest.MonkeyPatch) -> None:
        values = json.loads(Path(name).read_text())
        inner = {**values[key], **changes}
        values[key] = {name: value for name, value in inner.items() if value is not None or name not in changes}
        Path(name).write_text(json.dumps(values))

    return setup


def edit(name: str, key: str, change: Callable[[Any], torch.Tensor] | None) -> Setup:
    """A tensor of a safetensors file; None takes it out."""

    def setup(_: pytest.MonkeyPatch) -> None:
        tensors = load_file(name)
        old = tensors.pop(key, None)
        if change is not None:
            tensors[key] = change(old).contiguous()
        save_file(tensors, name, metadata={"format": "pt"})

    return setup


def tensors(name: str, **content: torch.Tensor) -> Setup:
    return lambda patch: save_file(content, name)


def raw(name: str, header: Any, data: bytes = b"") -> Setup:
    """A safetensors file byte for byte."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return write(name, len(text).to_bytes(8, "little") + text + data)


def tampered(stage: str, key: str, change: Callable[[Any], torch.Tensor]) -> Setup:
    """A tensor of a finished stage's first block, and the hash that its manifest has of it."""

    def setup(patch: pytest.MonkeyPatch) -> None:
        file = Path("run", stage, "block_000.safetensors")
        edit(str(file), key, change)(patch)
        alter(f"run/{stage}/lbllm_stage.json", "files", **{file.name: sha256(file.read_bytes()).hexdigest()})(patch)

    return setup


def kept(change: Callable[[Tensors, Any], tuple[Tensors, Any]]) -> Setup:
    """An unfinished training: its tensors and what its header says."""

    def setup(_: pytest.MonkeyPatch) -> None:
        file = "run/distill.partial/training.safetensors"
        with safe_open(file, "pt") as handle:
            facts = json.loads(handle.metadata()["facts"])
        changed, facts = change(load_file(file), facts)
        save_file(changed, file, metadata={"facts": json.dumps(facts)})

    return setup


def moment(tensors: Tensors) -> str:
    """The first of an optimizer's moments."""
    return next(name for name in sorted(tensors) if name.endswith("exp_avg"))


# What is done to the machine.


def replacing(name: str, act: Callable[[], None], times: int = 1) -> Setup:
    """`act` as a file of this name is put in place for the n-th time."""

    def setup(patch: pytest.MonkeyPatch) -> None:
        real, seen = os.replace, []

        def replace(source: Path, target: Path) -> None:
            seen.extend([1] * (Path(target).name == name))
            if Path(target).name == name and len(seen) == times:
                act()
            real(source, target)

        patch.setattr(os, "replace", replace)

    return setup


def stop(number: signal.Signals) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


def fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def free(size: int) -> Setup:
    """A disk on which so many bytes are free."""
    usage = namedtuple("usage", "total used free")
    return lambda patch: patch.setattr(shutil, "disk_usage", lambda place: usage(10, 9, size))


def gpus(count: int) -> Setup:
    def setup(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "is_available", lambda: count > 0)
        patch.setattr(torch.cuda, "device_count", lambda: count)

    return setup


def held(name: str) -> Setup:
    """Another process has locked a folder."""

    def setup(patch: pytest.MonkeyPatch) -> None:
        Path(name).mkdir(exist_ok=True)
        handle = Path(name, ".lock").open("w+")  # noqa: SIM115
        handle.write("4242")
        handle.flush()
        fcntl.flock(handle, fcntl.LOCK_EX)
        patch.setattr(held, "handle", handle, raising=False)  # open as long as the case lasts

    return setup


def own_cache(patch: pytest.MonkeyPatch) -> None:
    """Datasets that are prepared for a task go into the case's folder."""
    import datasets

    patch.setattr(datasets.config, "HF_DATASETS_CACHE", os.path.abspath("datasets"))
    patch.setenv("HF_DATASETS_CACHE", os.path.abspath("datasets"))


# Command lines.


def line(command: str, *more: str) -> tuple[str, ...]:
    return (command, "--recipe", "recipe.yaml", *more)


def generating(*more: str, model: str = "model", prompt: str = "the sea") -> tuple[str, ...]:
    return ("generate", "--model", model, "--prompt", prompt, "--max-new-tokens", "2", *more)


def _options() -> list[Case]:
    """What typer refuses, and values of options that only lbllm knows."""
    lines: dict[str, tuple[str, ...]] = {
        "no such command": ("quantize",),
        "no such option": line("ptq", "--nonsense"),
        "no recipe": ("distill",),
        "a recipe without a value": ("eval", "--recipe"),
        "no such phase": line("act-calib", "--only", "codes"),
        "an option of another command": line("report", "--force"),
        "generate without a prompt": ("generate", "--model", "model"),
        "generate without a model": ("generate", "--prompt", "x"),
        "generate with a recipe": ("generate", "--recipe", "recipe.yaml"),
        "no tokens": ("generate", "--model", "model", "--prompt", "x", "--max-new-tokens", "0"),
        "tokens that are no number": ("generate", "--model", "model", "--prompt", "x", "--max-new-tokens", "many"),
        "a temperature too high": generating("--temperature", "2.5"),
        "a temperature below zero": generating("--temperature", "-1"),
        "a temperature that is no number": generating("--temperature", "nan"),
        "a seed below zero": generating("--seed", "-1"),
        "a seed of 64 bits": generating("--seed", str(2**63)),
        "a device of no kind": generating("--device", "gpu"),
    }
    # Which values a range or a choice has, typer says in words of its own.
    words = r"(?<=-[a-z]{4}': ).*|(?<=-[a-z]{6}': ).*|(?<=-[a-z]{11}': ).*| \(Possible options: .*\)"
    found = [Case(f"options: {name}", arguments, library=words) for name, arguments in lines.items()]
    return [
        *found,
        Case("options: a device of a machine without one", generating("--device", "cuda"), gpus(0)),
        Case("options: a device beyond the last", generating("--device", "cuda:2"), gpus(2)),
        Case("recipe: a device of a machine without one", line("validate", "runtime.device=cuda:1"), gpus(0)),
        Case("recipe: a device beyond the last", line("act-calib", "runtime.device=cuda:9"), gpus(3)),
    ]


def _recipe_files() -> list[Case]:
    reading = ("config", "--recipe", "r.yaml")
    base = "model: {path: some/model}\noutput: {dir: runs/a}\n"
    long = "${env:LBLLM_LONG}" * 1000
    texts: dict[str, str | bytes] = {
        "no YAML": "model: [",
        "a list": "- a",
        "empty": "",
        "bytes": b"model: {path: \xe9}\n",
        "a key twice": base + "model: {path: b}\n",
        "a key that is a number": base + "1: 2",
        "a key that is a list": base + "? [a]\n: 2",
        "merge keys": base + "a: &x {rounds: 1}\nptq: {<<: *x}",
        "an alias of itself": base + "a: &a [*a]",
        "an alias of nothing": base + "a: *nothing",
        "brackets without an end": base + "ptq: " + "[" * 40,
        "aliases of aliases": base + "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
        "thirty thousand values": base + "ptq: [" + "1," * 30_000 + "]",
        "two documents": "--- {}\n--- {}",
        "a tag that does not fit": base + "a: !!bool 7",
        "a tag of Python": base + "a: !!python/object/apply:os.getcwd []",
        "an integer of any length": base + "a: " + "9" * 5000,
        "nothing that has no default": "recipe_version: 1\n",
        "sections without their keys": "model: {}\noutput: {}\n",
        "another version": base + "recipe_version: 2",
        "many mistakes": base
        + """
runtme: {}
runtime: {device: gpu, batch_size: 0, sede: 3}
data:
  calibration: {sequences: "32", lenght: 512, source: [{source: a.txt, weigth: 2}, {source: b.txt, weight: 0}]}
  evaluation:
    - {name: a, source: a.txt}
    - {name: "b c", source: [{source: b.txt, text_kye: t}], length: 4}
ptq: {group_size: 100, damping: 0, em_iterations: 1.5, compensation: 1, levels: kmeans, zzz: 1}
eval: {checkpoints: [base, pqt]}
export: {shard_gb: -1, format: 3}
""",
        "a thousand mistakes": base + "ptq:\n" + "".join(f"  key{number}: 1\n" for number in range(1000)) + f"  {'k' * 900}: 1\n",
        "variables that are not set": base
        + "ptq: {rounds: '${env:LBLLM_GONE}', zz: 1}\neval: {tasks: ['${env:LBLLM_A}/${env:LBLLM_B}']}",
    }
    found = [Case(f"recipe: {name}", reading, write("r.yaml", text)) for name, text in texts.items()]
    variable = both(
        write("r.yaml", "output: {dir: a}\nmodel: {path: '" + long + "'}"), lambda patch: patch.setenv("LBLLM_LONG", "a" * 60_000)
    )
    large = lambda patch: os.truncate(os.open("r.yaml", os.O_CREAT | os.O_WRONLY), 1 << 30)  # noqa: E731
    return [
        *found,
        Case("recipe: a variable of any size", reading, variable),
        Case("recipe: not there", ("ptq", "--recipe", "no/none.yaml")),
        Case("recipe: a folder", ("distill", "--recipe", "model")),
        Case("recipe: a pipe", ("act-calib", "--recipe", "r.yaml"), pipe("r.yaml")),
        Case("recipe: below a file", ("eval", "--recipe", "recipe.yaml/r.yaml")),
        Case("recipe: a name that is too long", ("report", "--recipe", "a" * 9000)),
        Case("recipe: of a user that there is not", ("export", "--recipe", "~nosuchuser/r.yaml")),
        Case("recipe: too large", ("validate", "--recipe", "r.yaml"), large),
    ]


def _overrides() -> list[Case]:
    values = {
        "no key": "=3",
        "no value": "ptq.rounds",
        "too deep": "a" + ".a" * 13 + "=1",
        "no YAML": "ptq.rounds=[1",
        "into a list": "data.evaluation.name=b",
        "into text": "model.path.x=1",
        "too long": f"model.path={'a' * 100_001}",
        "an unknown key": "ptq.group_sise=64",
        "an unknown key without a near one": "export.zzz=1",
        "a value that is empty": "model.path=",
        "text for a number": "ptq.group_size=abc",
        "no multiple of 16": "ptq.group_size=100",
        "a group that is too small": "ptq.group_size=8",
        "a union": "ptq.asymmetric=none",
        "infinity": "ptq.damping=.inf",
        "a number for a section": "ptq=5",
        "a seed of 64 bits": f"runtime.seed={2**63}",
        "tokens beyond memory": "data.training={sequences: 1000000000, length: 1000}",
        "segments beyond memory": "data.evaluation=[{name: a, source: a, segments: 9999999, length: 9999}]",
        "tokens of a phase beyond memory": "distill.end_to_end={sequences: 2000000000}",
        "half a surrogate pair": 'model.path="\\ud800"',
        "no evaluation": "data.evaluation=[]",
        "one name twice": "data.evaluation=[{name: a, source: x}, {name: a, source: y}]",
        "a name that no file has": "data.evaluation=[{name: a/b, source: x}]",
        "no source": "data.calibration.source=[]",
        "a source without its name": "data.calibration.source=[{weight: 2}]",
        "one sequence to hold out": "data.calibration.sequences=1",
        "one sequence to train on": "data.training.sequences=1",
        "a step that is too large": "distill.batch_size=9",
        "a step of a phase that is too large": "distill.end_to_end.batch_size=6",
        "more sequences than there are": "act_calib.sequences=10",
        "a kind twice": "act_calib.train=[levels, levels]",
        "knees alone": "act_calib.train=[knees]",
        "levels and scales": "distill.end_to_end.train=[levels, scales]",
        "weights and scales": "distill.end_to_end.train=[weights, scales]",
        "bits of levels": "ptq.level_bits=6",
        "groups of steps": "act_calib.group_size=48",
        "knees without quantizers": "distill.end_to_end.train=[knees]",
        "a bitmap that is none": "distill.train=[bitmap]",
        "bits": "act_calib.bits=2",
        "a parent that comes after": "act_calib.parent=act-calib",
        "a variable that is none": "model.path=${HOME}/model",
        "a limit of nothing": "eval.limit=0",
    }
    unmade = line("config", "distill.end_to_end=null", "act_calib.parent=distill-e2e")
    return [
        *(Case(f"override: {name}", line("config", value)) for name, value in values.items()),
        Case("override: a parent that nothing makes", unmade),
    ]


def _models() -> list[Case]:
    weights, config = "model/model.safetensors", "model/config.json"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    index = "model/model.safetensors.index.json"
    named = dict.fromkeys(["model.norm.weight"], "model-1.safetensors")
    spoiled: dict[str, Setup] = {
        "no weights": remove(weights),
        "weights of another format": both(remove(weights), write("model/pytorch_model.bin", b"x")),
        "an empty weight file": write(weights, b""),
        "a header beyond the file": write(weights, (1 << 40).to_bytes(8, "little") + b"{}"),
        "a header that is no JSON": raw(weights, b"{not json"),
        "a tensor that is none": raw(weights, {"a": 5}),
        "a file cut short": raw(weights, {"a": entry}, bytes(7)),
        "a gap between tensors": raw(weights, {"a": {**entry, "data_offsets": [8, 16]}}, bytes(16)),
        "a dtype that is not read": raw(weights, {"a": {**entry, "dtype": "F8_E4M3"}}, bytes(8)),
        "a pipe": pipe(weights),
        "a tensor that is missing": edit(weights, f"{DOWN}.weight", None),
        "a tensor too many": edit(weights, "model.layers.0.self_attn.q_proj.bias", lambda _: torch.ones(32)),
        "a tensor of another shape": edit(weights, NORM, lambda _: torch.ones(3)),
        "a tensor of another dtype": edit(weights, NORM, lambda old: old.int()),
        "an index without a map": both(remove(weights), write(index, "{}")),
        "an index that is no JSON": both(remove(weights), write(index, "[" * 100_000)),
        "an index with odd metadata": both(remove(weights), write(index, json.dumps({"metadata": 1, "weight_map": named}))),
        "an index of files elsewhere": both(remove(weights), write(index, json.dumps({"weight_map": {"a": "../x.safetensors"}}))),
        "a shard that is missing": both(remove(weights), write(index, json.dumps({"weight_map": named}))),
        "a tensor that no shard holds": both(
            remove(weights),
            write(index, json.dumps({"weight_map": {**named, "y.weight": "model-1.safetensors"}})),
            tensors("model/model-1.safetensors", **{NORM: torch.ones(32)}),
        ),
        "a tensor in two shards": both(
            remove(weights),
            write(index, json.dumps({"weight_map": {**named, "y.weight": "model-2.safetensors"}})),
            tensors("model/model-1.safetensors", **{NORM: torch.ones(32)}),
            tensors("model/model-2.safetensors", **{NORM: torch.ones(32), "y.weight": torch.ones(2)}),
        ),
        "no configuration": remove(config),
        "a configuration that is no JSON": write(config, "{"),
        "a configuration that is too deep": write(config, "[" * 100_000),
        "a configuration that is a number": write(config, "7"),
        "no tokenizer": remove("model/tokenizer.json"),
        "Conv1D": rewrite(config, model_type="gpt2"),
        "experts that are not there": rewrite(config, model_type="mixtral", num_local_experts=8),
        "a family that is not supported": rewrite(config, model_type="bloom"),
        "a family that is no name": rewrite(config, model_type=["llama"]),
        "quantized already": rewrite(config, quantization_config={"quant_method": "gptq"}),
        "an encoder": rewrite(config, is_encoder_decoder=True),
        "blocks of different shapes": rewrite(config, per_layer_config={"0": {"intermediate_size": 16}}),
        "a size beyond any model's": rewrite(config, num_hidden_layers=10**9),
        "a size below one": rewrite(config, hidden_size=-1),
        "a size that is no integer": rewrite(config, head_dim=1.5),
        "nested without an end": rewrite(config, a=json.loads("[" * 100 + "]" * 100)),
        "heads that do not divide": rewrite(config, num_attention_heads=4, num_key_value_heads=3),
        "a window of nothing": rewrite(config, model_type="mistral", sliding_window=0),
        "layers of no type": rewrite(config, model_type="qwen2", layer_types=["chunked_attention"] * 2),
        "a small constant below zero": rewrite(config, rms_norm_eps=-1.0),
        "rotary embeddings that are not finite": rewrite(config, rope_parameters={"rope_theta": -1.0, "rope_type": "default"}),
        "one block more than is stored": rewrite(config, num_hidden_layers=3),
        "one block less than is stored": rewrite(config, num_hidden_layers=1),
    }
    found = [Case(f"model: {name}", line("ptq"), setup) for name, setup in spoiled.items()]
    unused = r"(?<=cannot be used: ).*"
    return [
        *found,
        Case("model: an odd head", line("ptq"), rewrite(config, head_dim=17), library=unused),
        Case("model: an activation that is none", line("ptq"), rewrite(config, hidden_act="sigmoidal"), library=unused),
        Case(
            "model: a tokenizer that is none",
            line("ptq"),
            write("model/tokenizer.json", bytes(range(256))),
            library=r"(?<=cannot be loaded: ).*",
        ),
        Case("model: no folder", line("validate", "model.path=nowhere/at/all")),
        Case("model: a file", line("export", "model.path=model/config.json")),
        Case("model: of a user that there is not", line("eval", "model.path=~nosuchuser/m")),
        Case(
            "model: not on the hub",
            line("distill", "model.path=nobody/nothing-here"),
            library=r"(?<=hub \().*(?=\)\. Give)",
        ),
        Case("model: a length beyond its positions", line("distill", "data.training.length=4096")),
        Case("model: lengths beyond its positions", line("validate", "data.calibration.length=200", "data.training.length=300")),
        Case("model: trained in float16", line("distill", "model.dtype=float16")),
        Case(
            "model: several mistakes at once",
            line("ptq", "data.calibration.source=builtin:poems", "runtime.device=cuda"),
            both(remove("model/tokenizer.json"), gpus(0)),
        ),
        Case("model: NaN in a weight", line("ptq"), edit(weights, f"{DOWN}.weight", lambda old: old * torch.nan)),
        Case("model: NaN in the embedding", line("ptq"), edit(weights, EMBEDDING, lambda old: old * torch.nan)),
        Case(
            "model: inputs beyond all bounds",
            line("ptq"),
            edit(weights, "model.layers.1.post_attention_layernorm.weight", lambda old: old * 0 + 3e38),
        ),
        Case(
            "model: weights beyond all bounds",
            line("ptq"),
            edit(weights, f"{DOWN}.weight", lambda old: old * 1e10),
            library=r"(?<=levels reach )[^,]*",
        ),
        Case(
            "model: outputs beyond float16",
            line("ptq", "model.dtype=float16"),
            both(
                edit(weights, f"{DOWN}.weight", lambda old: old * 2e5),
                edit(weights, f"{DOWN.replace('down', 'up')}.weight", lambda old: old * 100),
            ),
        ),
    ]


def _texts() -> list[Case]:
    """Text of `ptq`, unless another command is named."""
    good = [{"role": "user", "content": "hello"}]

    def chats(*messages: Any, template: str | None = None) -> Setup:
        lines = "\n".join(json.dumps({"chat": found}) for found in messages)
        plain = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        return both(write("a.jsonl", lines), write("model/chat_template.jinja", plain if template is None else template))

    def reading(name: str) -> tuple[str, ...]:
        return line("ptq", f"data.calibration.source={name}")

    contents: dict[str, tuple[str, str | bytes]] = {
        "no UTF-8": ("a.txt", b"caf\xe9"),
        "too short": ("a.txt", "A short text. " * 10),
        "an unknown kind": ("a.csv", "a"),
        "a line that is no JSON": ("a.jsonl", '{"text": "a"}\n{"text"\n'),
        "a line that is too deep": ("a.jsonl", '{"text": "a"}\n' + "[" * 50_000),
        "a record that is none": ("a.jsonl", '"text"\n'),
        "a record without the field": ("a.jsonl", '{"title": "a", "body": "b"}\n'),
        "a field that is no text": ("a.jsonl", '{"text": ["a"]}\n'),
        "half a surrogate pair": ("a.jsonl", '{"text": "a"}\n{"text": "a \\ud83d b"}\n'),
        "a list that is cut": ("a.json", '[{"text": "a"},'),
        "a list that goes on": ("a.json", '[{"text": "a"}] more'),
        "a list that is too deep": ("a.json", '[{"text": "a"}, ' + "[" * 50_000),
        "a record without an end": ("a.jsonl.gz", gzip.compress(bytes((64 << 20) + 1), 1)),
    }
    said: dict[str, tuple[str, str | bytes]] = {
        "no gzip": ("a.jsonl.gz", "no gzip"),
        "no parquet": ("a.parquet", "PAR1"),
        "no tokens": ("a.safetensors", "junk"),
        "no text in a line": ("a.jsonl", b'{"text": "\xe9"}\n'),
    }
    ids: dict[str, Tensors] = {
        "without ids": {"ids": torch.arange(64)},
        "of floats": {"input_ids": torch.ones(64, dtype=torch.float16)},
        "of three dimensions": {"input_ids": torch.zeros(2, 3, 16, dtype=torch.int64)},
        "of short rows": {"input_ids": torch.zeros(9, 20, dtype=torch.int64)},
        "below zero": {"input_ids": torch.full((400,), -3)},
        "beyond the vocabulary": {"input_ids": torch.full((400,), 4000)},
        "too few": {"input_ids": torch.zeros(100, dtype=torch.int64)},
    }
    names = {
        "no file": "no/such/file.txt",
        "no preset": "wikitext3",
        "no bundled text": "builtin:poems",
        "no name of the hub": "'hub:a b'",
        "a folder that is no dataset": "model",
        "of a user that there is not": "~nosuchuser/a.txt",
        "a name that is too long": "a" * 300 + ".txt",
        "a name without an end": "a" * 5000,
        "a NUL": '"a\\0.txt"',
        "a preset's file that is not there": "{source: ptb, path: no.jsonl}",
        "a split of a preset": "{source: wikitext2, split: validation}",
        "a split of bundled text": "{source: 'builtin:calibration', split: test}",
        "a path beside a path": "{source: chapter.txt, path: other.jsonl}",
    }
    conversations: dict[str, Setup] = {
        "no list": chats(good, "hello"),
        "an empty list": chats([]),
        "a message that is text": chats(["hello"]),
        "no role": chats([{"from": "user", "value": "hello"}]),
        "content that is a number": chats([{"role": "user", "content": 7}]),
        "a template of gigabytes": chats(good, template="{{ 'ab' * 3000000000 }}"),
        "a template of megabytes": chats(good, template="{{ 'a' * 5000000 }}"),
        "no template": write("a.jsonl", json.dumps({"chat": good})),
    }
    talking = line("ptq", "data.calibration.source={source: a.jsonl, messages_key: chat}")
    sharing = "data.evaluation=[{name: a, source: [{source: chapter.txt, weight: 2}, {source: chapter.txt}], length: 32}]"
    unread = r"(?<=cannot be read: ).*"
    return [
        *(Case(f"text: {name}", reading(file), write(file, content)) for name, (file, content) in contents.items()),
        *(Case(f"text: {name}", reading(file), write(file, content), library=unread) for name, (file, content) in said.items()),
        *(Case(f"tokens: {name}", reading("a.safetensors"), tensors("a.safetensors", **found)) for name, found in ids.items()),
        *(Case(f"source: {name}", reading(value)) for name, value in names.items()),
        *(Case(f"chat: {name}", talking, setup) for name, setup in conversations.items()),
        Case(
            "chat: a template that fails",
            talking,
            chats(good, template="{{ raise_exception('no\nmore') }}"),
        ),
        Case("text: a pipe", reading("a.txt"), pipe("a.txt")),
        Case("text: a device", reading("a.jsonl"), link("a.jsonl", "/dev/zero")),
        Case("text: a preset's pipe", reading("{source: c4, path: a.json.gz}"), pipe("a.json.gz")),
        Case("text: few long records", reading("{source: c4, path: a.jsonl}"), write("a.jsonl", '{"text": "short"}\n' * 9)),
        Case("text: weights without segments", line("eval", sharing)),
        Case("text: few segments", line("eval", "data.evaluation=[{name: a, source: chapter.txt, length: 32, segments: 5000}]")),
        Case("text: of the model itself", line("eval", "data.evaluation=[{name: a, source: 'generate:'}]")),
        Case("text: no evaluation part", line("validate", "data.evaluation=[{name: a, source: redpajama}]")),
        Case(
            "text: from the hub",
            reading("'hub:some/data'"),
            library=r"(?<=hub: ).*(?=\. Without a network)",
        ),
        Case(
            "text: no BOS",
            line("ptq", "data.calibration.bos=true"),
            write("model/tokenizer_config.json", '{"tokenizer_class": "TokenizersBackend"}'),
        ),
        Case("text: of a phase is not there", line("distill", "distill.end_to_end.source=nowhere.txt"), base="run"),
        Case("text: too little for a phase", line("distill", "distill.end_to_end.sequences=4000"), base="run"),
        Case("text: all of it left out", line("act-calib", "act_calib.end_to_end.skip=4000", "--only", "end-to-end"), base="run"),
        Case("text: too little to train on", line("distill", "data.training.sequences=90000", "--only", "blocks"), base="run"),
        Case(
            "text: too little for every stage", line("validate", "data.training.source=a.txt"), write("a.txt", "A short text. ")
        ),
        Case("text: too few tokens for quantizers", line("act-calib", "act_calib.sequences=5"), base="run"),
    ]


def _folders() -> list[Case]:
    """What lies in the output folder, or where it is."""
    mine = {
        name: write(f"run/{name}/notes.txt", "mine") for name in ("ptq", "ptq.partial", "ptq.replaced", "ptq.partial/streams")
    }
    found = [Case(f"folders: a user's file in {name}", line("ptq"), setup) for name, setup in mine.items()]
    task = "eval.tasks=[builtin:continuation]"
    exporting = line("export", "--force", "export.format=dense")
    return [
        *found,
        Case("folders: a user's file in a stage that is replaced", line("distill", "--force"), write("run/distill/a", ""), "run"),
        Case("folders: a user's folder in a stage", line("act-calib", "--force"), folder("run/act-calib/mine"), "run"),
        Case("folders: streams of a user", line("act-calib"), write("run/act-calib/streams/mine", ""), "run"),
        Case("folders: a user's file in an export", exporting, write("run/export/notes.txt", "mine"), "run"),
        Case("folders: a user's file beside an export", exporting, write("run/export.partial/notes.txt", "mine"), "run"),
        Case("folders: a user's file in a replaced export", exporting, write("run/export.replaced/notes.txt", "mine"), "run"),
        Case(
            "folders: a model for an export",
            exporting,
            both(remove("run/export"), lambda patch: shutil.copytree("model", "run/export")),
            "run",
        ),
        Case("folders: streams of `eval`", line("eval"), write("run/eval/streams/notes.txt", "mine")),
        Case(
            "folders: a model of `eval`",
            line("eval", "eval.checkpoints=[ptq]", task),
            both(own_cache, write("run/eval/ptq.model/notes.txt", "mine")),
            "run",
        ),
        Case("folders: results of something else", line("eval"), write("run/eval/results.json", "{}")),
        Case("folders: a report of somebody else", line("report"), write("run/report.html", "mine"), "run"),
        Case("folders: a file for a stage", line("distill"), write("run/distill", "")),
        Case("folders: a file for what is sampled", line("validate"), write("run/generated", "")),
        Case("folders: a folder for a report", line("report"), folder("run/report.md")),
        Case("folders: a folder for the lock", line("ptq"), folder("run/.lock")),
        Case("folders: a link that leads to itself", line("export"), link("run/export", "export")),
        Case("folders: a link for a stage", line("ptq"), both(folder("other"), link("run/ptq", "../other"))),
        Case("folders: no stage", line("ptq", "--force"), write("run/ptq/loss.png", "mine")),
        Case("lock: somebody else's file", line("ptq"), write("run/.lock", "mine")),
        Case("lock: a link", line("ptq"), link("run/.lock", "../chapter.txt")),
        Case("lock: held by a process", line("ptq"), held("run")),
        Case("lock: held as `eval` begins", line("eval"), held("run")),
        Case("lock: a teacher's is held", line("distill", "--only", "end-to-end", "--force"), held("teacher"), "run"),
        Case("output: a file", line("ptq", "output.dir=chapter.txt")),
        Case("output: below a file", line("ptq", "output.dir=chapter.txt/below")),
        Case("output: the model's own", line("ptq", "output.dir=model")),
        Case("output: of a user that there is not", line("report", "output.dir=~nosuchuser/run")),
        Case("output: a name that is too long", line("validate", f"output.dir={'x' * 300}")),
        Case("output: too long for its files", line("ptq", f"output.dir={'/'.join(['x' * 200] * 20)}")),
        Case(
            "overlap: a model in the export's place",
            line("ptq", "model.path=run/export"),
            lambda patch: shutil.copytree("model", "run/export"),
        ),
        Case("overlap: text in a stage", line("ptq", "data.calibration.source=run/ptq/a.txt"), write("run/ptq/a.txt", "a")),
        Case(
            "overlap: evaluation text in the export's place",
            line("eval", "data.evaluation=[{name: a, source: run/export/a.txt}]"),
            write("run/export/a.txt", "a"),
        ),
        Case("overlap: a teacher in a stage", line("distill", "distill.end_to_end.teacher=run/ptq/t"), base="run"),
        Case("overlap: a teacher in the model", line("distill", "distill.end_to_end.teacher=model/t"), base="run"),
        Case("overlap: a teacher in the output folder's place", line("act-calib", "act_calib.end_to_end.teacher=run")),
        Case("disk: too small for a stage", line("ptq"), free(1000)),
        Case("disk: too small for everything", line("validate"), free(1000)),
        Case("disk: too small for an export", line("export", "--force"), free(1000), "run"),
        Case("disk: too small to measure", line("eval", "runtime.streams=disk"), free(1000)),
    ]


def _stages() -> list[Case]:
    """Stages that are not there, are of something else, or were changed."""
    manifest = "run/ptq/lbllm_stage.json"
    again = line("ptq")
    parent = {"stage": "act-calib", "fingerprint": "x"}
    records: dict[str, Setup] = {
        "empty": write(manifest, ""),
        "cut": write(manifest, '{"inputs": {"a": 1'),
        "bytes": write(manifest, b"\xff\xfe{}"),
        "too deep": write(manifest, "[" * 100_000),
        "a list": write(manifest, "[]"),
        "an object": write(manifest, "{}"),
        "a pipe": pipe(manifest),
        "of another version": rewrite(manifest, format_version=7),
        "of another stage": rewrite(manifest, stage="distill"),
        "inputs of another kind": rewrite(manifest, inputs={"a": {"b": 1}}),
        "no files": rewrite(manifest, files={}),
        "a file elsewhere": alter(manifest, "files", **{"../../outside": "0" * 64}),
        "a hash that is none": alter(manifest, "files", **{"block_001.safetensors": "abc"}),
        "a block that is missing": alter(manifest, "files", **{"block_000.safetensors": None}),
        "too few blocks": rewrite(manifest, blocks=3),
        "no group": rewrite(manifest, group_size=24),
        "a parent that is text": rewrite(manifest, parent="ptq"),
        "a parent after it": both(rewrite(manifest, parent=parent), alter(manifest, "inputs", **{"parent.files": "x"})),
        "a parent without its files": rewrite(manifest, parent=parent),
        "odd activations": rewrite(manifest, activations={"bits": 4}),
    }
    changed: dict[str, Setup] = {
        "another byte": flip("run/ptq/block_001.safetensors"),
        "no file": remove("run/ptq/block_000.safetensors"),
    }
    last = "run/act-calib-e2e/lbllm_stage.json"
    return [
        *(Case(f"manifest: {name}", again, setup, "run") for name, setup in records.items()),
        *(Case(f"block: {name}", line("ptq"), setup, "run") for name, setup in changed.items()),
        *(
            Case(f"block: {name}, for an export", line("export", "export.checkpoint=ptq"), setup, "run")
            for name, setup in changed.items()
        ),
        *(
            Case(f"manifest: the last stage's, for {name}", line(name), write(last, "{}"), "run")
            for name in ("export", "eval", "act-calib")
        ),
        Case("block: changed before it is measured", line("eval"), flip("run/distill/block_000.safetensors"), "run"),
        Case(
            "block: changed before a stage goes on from it",
            line("distill", "--force"),
            flip("run/ptq/block_000.safetensors"),
            "run",
        ),
        Case(
            "manifest: without what is outside the blocks",
            line("export"),
            write("run/act-calib-e2e/outer.safetensors", "x"),
            "run",
        ),
        Case("stage: nothing to export", line("export")),
        Case("stage: not there to be exported", line("export", "export.checkpoint=distill")),
        Case("stage: not there to be measured", line("eval", "eval.checkpoints=[ptq]")),
        Case("stage: not there to go on from", line("distill")),
        Case("stage: not there for activations", line("act-calib", "act_calib.parent=distill", "--only", "blocks")),
        Case("stage: not there for a phase", line("act-calib", "--only", "end-to-end")),
        Case("stage: interrupted", line("export"), base="halted"),
        Case("stage: no phase in the recipe", line("distill", "distill.end_to_end=null", "--only", "end-to-end"), base="run"),
        Case(
            "stage: no phase of activations in the recipe",
            line("act-calib", "act_calib.end_to_end=null", "--only", "end-to-end"),
            base="run",
        ),
        Case(
            "stage: a phase that the recipe has no more",
            line("act-calib", "distill.end_to_end=null", "act_calib.parent=distill-e2e"),
            base="run",
        ),
        Case("stage: of another recipe", line("ptq", "ptq.damping=0.1", "ptq.rounds=1"), base="run"),
        Case("stage: of other text", line("ptq", "data.calibration.sequences=5"), base="run"),
        Case("stage: of another seed", line("distill", "distill.lr_levels=0.5", "--only", "blocks"), base="run"),
        Case("stage: a phase of another recipe", line("distill", "distill.end_to_end.lr_norms=0.5"), base="run"),
        Case("stage: a parent of another recipe", line("distill", "ptq.damping=0.5"), base="run"),
        Case("stage: a parent of other text", line("distill", "data.calibration.sequences=5"), base="run"),
        Case("stage: an ancestor of another recipe", line("act-calib", "ptq.damping=0.5"), base="run"),
        Case("stage: another parent than it says", line("act-calib", "act_calib.parent=ptq"), base="run"),
        Case(
            "stage: an ancestor that was made again",
            line("export"),
            tampered("ptq", f"{DOWN.replace('1', '0')}.levels", lambda old: old.flip(0)),
            "run",
        ),
        Case(
            "stage: a parent that was made again",
            line("act-calib", "--only", "blocks"),
            tampered("distill-e2e", f"{DOWN.replace('1', '0')}.levels", lambda old: old.flip(0)),
            "run",
        ),
        Case("stage: of another model", line("eval"), rewrite("model/config.json", rope_theta=5000.0), "run"),
        Case("stage: a parent of another model", line("distill"), rewrite("model/config.json", rope_theta=5000.0), "run"),
        Case(
            "stage: of another number of blocks",
            line("export", "export.checkpoint=ptq"),
            both(
                rewrite(manifest, blocks=3),
                alter(manifest, "files", **{"block_002.safetensors": "0" * 64}),
            ),
            "run",
        ),
        Case("stage: another group", line("distill"), rewrite(manifest, group_size=32), "run"),
        Case("stage: other bits of levels", line("distill"), rewrite(manifest, format_version=2, level_bits=4), "run"),
        Case("stage: bits of levels in an early version", line("distill"), rewrite(manifest, level_bits=4), "run"),
        Case("report: nothing to report", line("report")),
        Case(
            "report: results that are damaged",
            line("report"),
            write("run/eval/results.json", '{"base": {"perplexity": {"a": 0}}}'),
        ),
        Case("report: results of another kind", line("report"), write("run/eval/results.json", "[]")),
        Case("report: results that are no JSON", line("report"), write("run/eval/results.json", "[" * 9999)),
        Case(
            "report: details that are damaged",
            line("report"),
            write("run/eval/details.json", '{"base": {"novels": {"positions": []}}}'),
        ),
        Case(
            "report: details of two depths",
            line("report"),
            write(
                "run/eval/details.json",
                json.dumps(
                    {
                        "base": {
                            text: {
                                "blocks": [dict.fromkeys(("relative", "relative_ordinary", "cosine", "decibels"), 0.5)] * count
                            }
                            for text, count in (("a", 1), ("b", 2))
                        }
                    }
                ),
            ),
        ),
    ]


def _unfinished() -> list[Case]:
    """Stages that were stopped: progress, streams, training; and a stop."""
    progress = "run/ptq.partial/progress.json"
    going_on = line("ptq", "runtime.streams=disk")
    records: dict[str, Setup] = {
        "cut": write(progress, '{"inputs": {"a": 1'),
        "a list": write(progress, "[]"),
        "bytes": write(progress, b"\xff\xfe{}"),
        "no files": rewrite(progress, files=None),
        "a block that is none": alter(progress, "files", **{"block_004.safetensors": "0" * 64}),
        "a hash that is none": alter(progress, "files", **{"block_000.safetensors": 7}),
        "more blocks than there are": alter(progress, "files", **{f"block_00{i}.safetensors": "0" * 64 for i in range(4)}),
    }
    trainings: dict[str, Setup] = {
        "no facts": kept(lambda tensors, facts: (tensors, [1])),
        "a block as text": kept(lambda tensors, facts: (tensors, {**facts, "block": "0"})),
        "an epoch that is a list": kept(lambda tensors, facts: (tensors, {**facts, "epoch": [1]})),
        "an epoch beyond the last": kept(lambda tensors, facts: (tensors, {**facts, "epoch": 7})),
        "no start": kept(lambda tensors, facts: (tensors, {**facts, "start": {}})),
        "records of no epoch": kept(lambda tensors, facts: (tensors, {**facts, "epochs": [{}, {}]})),
        "an unknown fact": kept(lambda tensors, facts: (tensors, {**facts, "colour": 1})),
        "a tensor that is missing": kept(
            lambda tensors, facts: ({k: v for k, v in tensors.items() if k != moment(tensors)}, facts)
        ),
        "a tensor too many": kept(lambda tensors, facts: ({**tensors, "9.9/value": torch.zeros(1)}, facts)),
        "a tensor of another shape": kept(lambda tensors, facts: ({**tensors, moment(tensors): torch.zeros(3)}, facts)),
        "values that were changed": flip("run/distill.partial/training.safetensors"),
        "a pipe": pipe("run/distill.partial/training.safetensors"),
    }
    training = line("distill", "--only", "blocks", *TRAIN)
    block = "block_001.safetensors"
    ends: dict[str, Setup] = {
        "SIGINT": replacing("progress.json", stop(signal.SIGINT), 2),
        "SIGTERM": replacing("progress.json", stop(signal.SIGTERM), 2),
        "an interrupt in a library": replacing(block, fail(KeyboardInterrupt())),
        "a full disk": replacing(block, fail(OSError(28, "No space left on device", f"run/ptq.partial/{block}"))),
        "a full disk in safetensors": replacing(block, fail(SafetensorError("I/O error: No space left on device (os error 28)"))),
        "a quota in safetensors": replacing(block, fail(SafetensorError("I/O error: Disk quota exceeded (os error 122)"))),
        "a folder that is a file by now": replacing(block, fail(NotADirectoryError(20, "Not a directory", "run/ptq.partial"))),
        "an error without a name": replacing(block, fail(OSError(5, "Input/output error"))),
        "no memory": replacing(block, fail(torch.OutOfMemoryError("out of memory"))),
    }
    teacher = line("distill", "--only", "end-to-end", "--force")
    kept_record = "teacher/lbllm_teacher.json"
    return [
        *(Case(f"progress: {name}", going_on, setup, "halted") for name, setup in records.items()),
        *(Case(f"training: {name}", training, setup, "stopped") for name, setup in trainings.items()),
        *(Case(f"end: {name}", line("ptq"), setup) for name, setup in ends.items()),
        Case(
            "training: no such file",
            training,
            write("run/distill.partial/training.safetensors", b""),
            "stopped",
            r"(?<=SafetensorError: ).*(?=\); delete)",
        ),
        Case("progress: damaged, for a report", line("report"), write(progress, "{"), "halted"),
        Case("progress: of other inputs", line("ptq", "ptq.rounds=1"), base="halted"),
        Case("progress: a block that was changed", going_on, cut("run/ptq.partial/block_000.safetensors", 1), "halted"),
        Case("progress: a block that is gone", going_on, remove("run/ptq.partial/block_000.safetensors"), "halted"),
        Case("progress: a stream of another length", going_on, cut("run/ptq.partial/streams/quantized_001.bin", 4), "halted"),
        Case(
            "progress: all but in place, and damaged",
            line("ptq"),
            both(lambda patch: os.rename("run/ptq", "run/ptq.partial"), flip("run/ptq.partial/block_000.safetensors")),
            "run",
        ),
        Case(
            "sampled: damaged",
            line("ptq", "data.calibration.source=generate:"),
            _sampled(b"x" * 50),
            library=r"(?<=damaged \().*(?=\); delete)",
        ),
        Case("sampled: of another shape", line("ptq", "data.calibration.source=generate:"), _sampled(None)),
        Case("teacher: a file", teacher, both(remove("teacher"), write("teacher", "mine")), "run"),
        Case("teacher: below a file", (*teacher, "distill.end_to_end.teacher=file/t"), write("file", ""), "run"),
        Case("teacher: other files", teacher, both(remove(kept_record), write("teacher/notes.txt", "mine")), "run"),
        Case("teacher: states of another length", teacher, write("teacher/states.bin", "1234"), "run"),
        Case("teacher: no states", teacher, remove("teacher/states.bin"), "run"),
        Case("teacher: a record that is no JSON", teacher, write(kept_record, "{"), "run"),
        Case("teacher: a record that is a list", teacher, write(kept_record, "[]"), "run"),
        Case("teacher: of other text", (*teacher, "distill.end_to_end.sequences=7"), base="run"),
        Case("teacher: of another model", teacher, rewrite(kept_record, **{"model.files": "other"}), "run"),
        Case("disk: too small for a phase", (*teacher, "distill.end_to_end.teacher=t"), free(4000), "run"),
    ]


def _sampled(content: bytes | None) -> Setup:
    """Every name that sampled text can have holds something else. None: tokens of another shape."""

    def setup(patch: pytest.MonkeyPatch) -> None:
        exists = Path.exists

        def found(path: Path, **options: Any) -> bool:
            if path.parent.name == "generated" and not exists(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                if content is None:
                    save_file({"input_ids": torch.zeros(6, 31, dtype=torch.int64)}, path)
                else:
                    path.write_bytes(content)
            return exists(path, **options)

        patch.setattr(Path, "exists", found)

    return setup


def _exports() -> list[Case]:
    """Exports that are measured or generated from."""
    record, config, weights = "run/export/lbllm_export.json", "run/export/config.json", "run/export/model.safetensors"
    measuring = line("eval", "eval.checkpoints=[export]")
    running = generating("--raw", model="run/export")

    def settings(**changes: Any) -> Setup:
        return alter(config, "quantization_config", **changes)

    def layout(**changes: Any) -> Setup:
        usual = {
            "bits": 4,
            "kv_bits": 4,
            "granularity": "group",
            "form": "knee",
            "kv_form": "knee",
            "tables": 2,
            "group_size": 16,
        }
        return settings(activations={**usual, **changes})

    def later(patch: pytest.MonkeyPatch) -> None:
        settings(format_version=9)(patch)
        alter(record, "files", **{"config.json": sha256(Path(config).read_bytes()).hexdigest()})(patch)

    records: dict[str, Setup] = {
        "a list": write(record, "[]"),
        "no files": rewrite(record, files={}),
        "a configuration alone": rewrite(record, files={"config.json": "0" * 64}),
        "a file elsewhere": alter(record, "files", **{"../../x": "0" * 64}),
        "too deep": write(record, "[" * 9999),
        "weights that were changed": flip(weights),
        "of a later version": later,
    }
    packed: dict[str, Setup] = {
        "granularity": layout(granularity="row"),
        "another group of activations": layout(group_size=32),
        "bits": layout(bits=2),
        "more than is known": layout(more=1),
        "activations that are a list": settings(activations=[4]),
        "a group that is none": settings(group_size=24),
        "bits of levels that are none": settings(level_bits=6),
        "bits of levels in an early version": settings(level_bits=4),
        "other linears": settings(linears=["lm_head"]),
        "no version": settings(format_version="1"),
        "a version too early": settings(format_version=1),
        "levels of 2 bits in an early version": settings(level_bits=2),
        "a later version": settings(format_version=9),
        "codes of another shape": edit(weights, f"{DOWN}.weight", lambda old: old[:, :1]),
        "levels of another dtype": edit(weights, f"{DOWN}.levels", lambda old: old.float()),
        "no levels": edit(weights, f"{DOWN}.levels", None),
        "infinite scales": edit(weights, f"{DOWN}.scale", lambda old: old * torch.inf),
        "no norm": edit(weights, NORM, None),
        "a tensor too many": edit(weights, "x", lambda _: torch.ones(1)),
    }
    tables: dict[str, Setup] = {
        "levels that do not ascend": edit(weights, f"{INPUT}.act_levels", lambda old: old.flip(1)),
        "a zero that is no level": edit(weights, f"{INPUT}.act_zero", lambda old: old * 0 + 126),
        "clipping factors out of range": edit(weights, f"{INPUT}.act_clip", lambda old: old * 0),
    }
    # What was fitted is of this machine.
    numbers = r"(?<=got )\[.*\](?=; export)"
    return [
        *(Case(f"export: {name}", measuring, setup, "run") for name, setup in records.items()),
        *(Case(f"packed: {name}", running, setup, "run") for name, setup in packed.items()),
        *(Case(f"packed: {name}", running, setup, "run", numbers) for name, setup in tables.items()),
        Case("export: not there", line("eval", "eval.checkpoints=[base, export]")),
        Case("export: kernels that are none", line("eval", "eval.checkpoints=[export]"), base="run", kernels="fastest"),
        Case("packed: kernels that are none", running, base="run", kernels="fastest"),
        Case(
            "eval: predictions that are not finite",
            line("eval"),
            edit("model/model.safetensors", NORM, lambda old: old * 0 + 3e38),
        ),
    ]


def _generate() -> list[Case]:
    settings = "model/generation_config.json"
    folders: dict[str, Setup] = {
        "no configuration": remove("model/config.json"),
        "no weights": remove("model/model.safetensors"),
        "a tensor that is missing": edit("model/model.safetensors", NORM, None),
        "NaN": edit("model/model.safetensors", NORM, lambda old: old * torch.nan),
        "predictions that are not finite": edit("model/model.safetensors", NORM, lambda old: old * 0 + 3e38),
        "quantized by nobody": rewrite("model/config.json", quantization_config={"quant_method": "nobody"}),
        "quantized by a number": rewrite("model/config.json", quantization_config=5),
        "a size of another family": rewrite("model/config.json", n_layer=10**9),
        "settings that are a list": write(settings, "[]"),
        "a share that is text": rewrite(settings, top_p="high"),
        "a count below zero": rewrite(settings, top_k=-5),
        "an end that is no token": rewrite(settings, eos_token_id={"a": 1}),
        "a pipe for a tokenizer": pipe("model/special_tokens_map.json"),
        "no tokenizer": remove("model/tokenizer.json"),
        "a length that is text": rewrite("model/tokenizer_config.json", model_max_length="x"),
    }
    unrendered = r"(?<=render the messages: ).*(?=; mend)"
    bytes_ = b"caf\xe9".decode("utf-8", "surrogateescape")
    return [
        *(Case(f"generate: {name}", generating(), setup) for name, setup in folders.items()),
        Case("generate: no folder", generating(model="nowhere/at/all")),
        Case("generate: the folder of a run", generating(model="run"), base="run"),
        Case("generate: a file", generating(model="recipe.yaml")),
        Case("generate: of a user that there is not", generating(model="~nosuchuser")),
        Case("generate: not on the hub", generating(model="nobody/nothing-here"), library=r"(?<=hub \().*(?=\)\. Give)"),
        Case("generate: a prompt that is empty", generating("--raw", prompt="")),
        Case("generate: a prompt that is no text", generating(prompt=bytes_)),
        Case("generate: a prompt beyond the positions", generating(prompt="the sea " * 200)),
        Case(
            "generate: more tokens than positions",
            ("generate", "--model", "model", "--prompt", "the sea", "--max-new-tokens", "500"),
        ),
        Case("generate: a tokenizer of another model", generating(), lambda patch: save_toy(Path("model"), **TOY, vocab_size=16)),
        Case(
            "generate: a chat template that fails",
            generating(),
            write("model/chat_template.jinja", "{{ raise_exception('no') }}"),
            library=unrendered,
        ),
        Case(
            "generate: code of its own",
            generating(),
            rewrite("model/config.json", model_type="mine", auto_map={"AutoConfig": "mine.MineConfig"}),
            library=r"(?<=cannot be used: ).*(?=; it names code)",
        ),
    ]


def _tasks() -> list[Case]:
    """lm-eval tasks. What they are is read before a model is."""
    texts = {
        "a list": "- a",
        "no name": "{a: b}",
        "a path for a name": "task: ../../x",
        "data that is a list": "task: x\ndataset_kwargs: [1]",
        "data that is a number": "task: x\ndataset_kwargs: {data_files: {test: 7}}",
        "too deep": "task: " + "[" * 100_000,
        "no YAML": "task: [",
        "a pipe within": "task: x\ninclude: a_pipe",
    }
    unread = r"(?<=cannot be read: ).*"
    return [
        *(
            Case(
                f"task: {name}", line("eval", "eval.tasks=[t.yaml]"), both(write("t.yaml", text), pipe("a_pipe")), library=unread
            )
            for name, text in texts.items()
        ),
        Case("task: not there", line("validate", "eval.tasks=[none.yaml]")),
        Case("task: none of lbllm's", line("validate", "eval.tasks=[builtin:nothing]")),
        Case("task: two of one name", line("eval", "eval.tasks=[a.yaml, b.yaml]"), both(own_cache, _task("a"), _task("b"))),
        Case(
            "task: no data",
            line("eval", "eval.tasks=[a.yaml]"),
            both(own_cache, _task("a"), remove("a.jsonl")),
            library=r"(?<=cannot be loaded: ).*",
        ),
        Case(
            "task: fails on a model",
            line("eval", "eval.tasks=[a.yaml]", "eval.checkpoints=[base]"),
            both(own_cache, _task("a", choices=None)),
            library=r"(?<=on base: ).*",
        ),
        Case(
            "task: examples of a task without any",
            line("eval", "eval.tasks=[a.yaml]", "eval.num_fewshot=2"),
            both(own_cache, _task("a")),
        ),
    ]


def _task(name: str, **changes: Any) -> Setup:
    """A task called twin, its data beside it. changes: of its last document."""
    task = {
        "task": "twin", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice", "num_fewshot": 0,
        "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
    }  # fmt: skip
    item = {"context": "The sea was", "choices": ["calm", "a letter"], "gold": 0}
    items = [item, item, {**item, **changes}]
    return both(write(f"{name}.yaml", json.dumps(task)), write(f"{name}.jsonl", "\n".join(map(json.dumps, items))))


CASES = [
    *_options(), *_recipe_files(), *_overrides(), *_models(), *_texts(), *_folders(), *_stages(), *_unfinished(), *_exports(),
    *_generate(), *_tasks(),
]  # fmt: skip
