"""Exported folders, packed and dense, that `generate` and `eval` read."""

import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from bases import LOCK, RECIPE
from mutate import ODD, dump_json, load_json, mutate_tree, spoil_file
from promise import Case
from weight_files import edit_tensors, harm_tensor, spoil_data, spoil_header, spoil_index

_EVAL = ("work/run/eval", "work/run/eval/*")
# What lies in the base: W2A4KV4, W2A16, and decoded weights; the first is the run's own export too.
EXPORTS = ("run/export", "weights-only", "dense", "sharded")


def _case(work: Path, kind: str, rng: random.Random, folder: str, outcome: Any = "any") -> Case:
    if folder == "run/export" and rng.random() < 0.4:
        if rng.random() < 0.7:
            _record(work / folder)
            kind += ", recorded"
        line = ["eval", "--recipe", RECIPE, "eval.checkpoints=[export]"]
        return Case(f"eval: {kind}", line, (*LOCK, *_EVAL), outcome)
    options = rng.choice([[], [], ["--full-activations"], ["--raw"], ["--temperature", "1"]])
    line = ["generate", "--model", folder, "--prompt", "The sea", "--max-new-tokens", "4", *options]
    return Case(f"{' '.join(line[:3])}: {kind}", line, (), outcome)


def _record(folder: Path) -> None:
    """Lets the record of an export say that its files are as they should be: what reads them must see what is wrong."""
    try:
        record = load_json(folder / "lbllm_export.json")
        # A pipe is not read: nobody writes to it.
        paths = {name: folder / name for name in record["files"] if (folder / name).is_file()}
        record["files"] |= {name: sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
        dump_json(record, folder / "lbllm_export.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # one of them is what was mutated


def _weights(work: Path, name: str, rng: random.Random) -> Path:
    return rng.choice(sorted((work / name).glob("*.safetensors")))


def _harmed(work: Path, rng: random.Random) -> Case:
    name = rng.choice(EXPORTS)
    return _case(work, harm_tensor(_weights(work, name, rng), rng), rng, name, "refused")


def _harmed_outside(work: Path, rng: random.Random) -> Case:
    """Tensors outside the packed linears: embedding, norms."""
    name = rng.choice(EXPORTS)
    file = _weights(work, name, rng)
    from safetensors.torch import load_file

    outside = [key for key in load_file(file) if "norm" in key or "embed" in key] or [None]
    return _case(work, harm_tensor(file, rng, rng.choice(sorted(outside, key=str))), rng, name, "refused")


# Values of a quantizer or linear that have no meaning: (ending of the name, how it is changed).
_MEANINGLESS = (
    ("act_clip", lambda t: t * 0), ("act_clip", lambda t: -t), ("act_clip", lambda t: t * float("nan")),
    ("act_clip", lambda t: t * 1e30),
    ("act_levels", lambda t: t.flip(-1)), ("act_levels", lambda t: t * 0), ("act_zero", lambda t: t * 0 + 255),
    (".scale", lambda t: t * float("nan")),
    ("layernorm.weight", lambda t: t * float("nan")), ("norm.weight", lambda t: t * float("inf")),
    ("embed_tokens.weight", lambda t: t * float("nan")),
    ("act_clip", lambda t: t[:0]), ("act_levels", lambda t: t[..., :3]), (".levels", lambda t: t[..., :2]),
    (".weight", lambda t: t[..., :1]),
    (".levels", lambda t: t.float()), (".scale", lambda t: t.float()), ("act_clip", lambda t: t.to(torch.bfloat16)),
    (".weight", lambda t: t[:1]),
)  # fmt: skip


def _meaningless(work: Path, rng: random.Random) -> Case:
    ending, change = rng.choice(_MEANINGLESS)
    file, said = work / "run/export/model.safetensors", ""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal said
        names = sorted(name for name in tensors if name.endswith(ending))
        said = rng.choice(names)
        tensors[said] = change(tensors[said]).contiguous()

    edit_tensors(file, spoil)
    return _case(work, f"{said} without meaning", rng, "run/export", "refused")


def _config(work: Path, rng: random.Random) -> Case:
    name = rng.choice(EXPORTS)
    file = work / name / "config.json"
    values = load_json(file)
    part = values["quantization_config"] if "quantization_config" in values and rng.random() < 0.7 else values
    if part is not values and "activations" in part and rng.random() < 0.5:
        part = part["activations"]
    key = rng.choice(list(part))
    part[key] = rng.choice([*ODD, [part[key]], {"x": part[key]}, str(part[key]), 3, 4, 8, 32, 64, "token", "uniform"])
    dump_json(values, file)
    return _case(work, f"config {key} = {str(part[key])[:40]!r}", rng, name)


def _config_harmful(work: Path, rng: random.Random) -> Case:
    """Values that change what the stored tensors mean."""
    file = work / "run/export/config.json"
    values = load_json(file)
    packed = values["quantization_config"]
    how, owner, key, value = rng.choice(
        [
            ("format_version", packed, "format_version", 99), ("no version", packed, "format_version", None),
            ("group", packed, "group_size", 32),
            ("group 0", packed, "group_size", 0), ("group -1", packed, "group_size", -16), ("linears", packed, "linears", []),
            ("linears", packed, "linears", packed["linears"][:3]), ("linears", packed, "linears", "q_proj"),
            ("linears", packed, "linears", None),
            ("granularity", packed["activations"], "granularity", "nothing"),
            ("granularity", packed["activations"], "granularity", None),
            ("bits", packed["activations"], "bits", 3), ("bits", packed["activations"], "bits", "4"),
            ("kv_bits", packed["activations"], "kv_bits", 8),
            ("activations' group", packed["activations"], "group_size", 32), ("activations", packed, "activations", {}),
            ("activations", packed, "activations", []), ("layers", values, "num_hidden_layers", 1),
            ("layers", values, "num_hidden_layers", 3),
            ("heads", values, "num_key_value_heads", 2), ("vocabulary", values, "vocab_size", 512),
            ("method", packed, "quant_method", "gptq"),
        ]
    )  # fmt: skip
    owner[key] = value
    dump_json(values, file)
    return _case(work, f"config: {how} is {value}", rng, "run/export", "refused")


def _config_tree(work: Path, rng: random.Random) -> Case:
    name = rng.choice(EXPORTS)
    file = work / name / rng.choice(["config.json", "generation_config.json", "tokenizer_config.json", "lbllm_export.json"])
    values = load_json(file) if file.exists() else {"temperature": 1.0}
    what = mutate_tree(values, rng)
    dump_json(values, file)
    return _case(work, f"{file.name}: {what}", rng, name)


def _header(work: Path, rng: random.Random) -> Case:
    name = rng.choice(EXPORTS)
    return _case(work, spoil_header(_weights(work, name, rng), rng), rng, name)


def _data(work: Path, rng: random.Random) -> Case:
    name = rng.choice(EXPORTS)
    return _case(work, spoil_data(_weights(work, name, rng), rng), rng, name)


def _spoiled(work: Path, rng: random.Random) -> Case:
    name = rng.choice(EXPORTS)
    file = rng.choice(sorted(path for path in (work / name).iterdir() if path.is_file()))
    return _case(work, spoil_file(file, rng), rng, name)


def _index(work: Path, rng: random.Random) -> Case:
    shard = sorted((work / "sharded").glob("*.safetensors"))[0]
    (work / "outside.safetensors").write_bytes(shard.read_bytes())
    return _case(work, spoil_index(work / "sharded", rng), rng, "sharded")


def _empty(work: Path, rng: random.Random) -> Case:
    name = rng.choice(EXPORTS)
    _weights(work, name, rng).write_bytes(rng.choice([b"", (2).to_bytes(8, "little") + b"{}", b"\0" * 8, b"x"]))
    return _case(work, "a weight file that holds nothing", rng, name, "refused")


def _code(work: Path, rng: random.Random) -> Case:
    """A folder that brings code of its own: it must not run, whatever is typed."""
    name = rng.choice(EXPORTS)
    (work / name / "evil.py").write_text("open('../beside/precious.txt', 'w').write('evil')\nclass X: pass\n")
    file = work / name / rng.choice(["config.json", "tokenizer_config.json"])
    values = load_json(file)
    values["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.X")
    if rng.random() < 0.5:
        values["model_type"] = "evil"
        values["architectures"] = ["X"]
    if file.name == "tokenizer_config.json":
        values["auto_map"]["AutoTokenizer"] = ["evil.X", None]
        values["tokenizer_class"] = "X"
    dump_json(values, file)
    case = _case(work, f"code in {file.name}", rng, name)
    return Case(case.kind, case.arguments, case.writes, case.outcome, stdin="y\n" * 5)


KINDS = (
    _harmed, _meaningless, _config, _config_harmful, _header, _harmed_outside, _spoiled, _index, _config_tree, _empty, _code,
    _data, _config,
    _config_harmful, _meaningless,
)  # fmt: skip
