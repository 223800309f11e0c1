"""docs/format.md is true: a reader that knows nothing else gives what lbllm gives, bit for bit, and no key is left out."""

import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from docs import reader
from lbllm_cli.format.activations import Tables, quantize, split_groups, uniform_levels
from lbllm_cli.format.kv_record import read_record, write_record

SPECIFICATION = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
# Places T and Z of two tables of 8 and of 16 levels.
EIGHT = ([[0, 3, 4, 5, 6, 7, 11, 15], [0, 1, 2, 3, 4, 5, 6, 12]], [5, 2])
SIXTEEN = ([[0, 9, 18, *range(19, 28), 31, 35, 39, 43], [*range(15), 20]], [23, 7])


@pytest.fixture(scope="module")
def run(export_of) -> Path:
    """A W(1+1)A4KV4 toy with biases; group 32, widths 80 and 112: last groups are ragged."""
    return export_of("qwen2-biases").parent


def documented(*path: str) -> set[str]:
    """Keys in the first column of the tables under a heading of the specification."""
    _, _, text = SPECIFICATION.partition(f"\n### {path[0]}\n")
    rows = re.findall(r"^\| (`[^|]+) \|", text.split("\n### ")[0].split("\n## ")[0], flags=re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def hash_of(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def test_reader_stands_alone():
    text = (ROOT / "tests" / "docs" / "reader.py").read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    modules = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    modules |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert modules == {"json", "numpy"}
    assert len(text.splitlines()) < 90


def test_packed_weights_are_those_of_the_dense_export(run, tmp_path, ok):
    shutil.copytree(run, tmp_path / "run")
    # Small shards: a folder of several files.
    settings = (f"output.dir={tmp_path / 'run'}", "export.format=dense", "export.shard_gb=0.0002")
    ok("export", "--recipe", run.parent / "r.yaml", *settings)
    packed, dense = reader.read_folder(run / "export"), reader.read_folder(tmp_path / "run" / "export")
    assert len(list((tmp_path / "run" / "export").glob("model-*"))) > 1
    config = json.loads((run / "export" / "config.json").read_text())
    linears = [f"model.layers.{i}.{name}" for i in range(3) for name in config["quantization_config"]["linears"]]
    assert len(linears) == 21
    own = {f"{name}.{part}" for name in linears for part in ("weight", "levels", "scale")}
    for name in linears:
        wanted = dense[f"{name}.weight"]
        found = reader.weight(packed, name, wanted.shape[1])
        assert found.dtype == wanted.dtype
        assert found.tobytes() == wanted.tobytes(), name
    # Everything else is there under its own name.
    for name in dense.keys() - own:
        assert packed[name].tobytes() == dense[name].tobytes(), name
    quantizers = packed.keys() - dense.keys() - own
    named = re.findall(r"^\| `((?:self_attn|mlp)\.[\w.]+)` \|", SPECIFICATION, flags=re.MULTILINE)
    parts = ("act_levels", "act_zero", "act_clip")
    wanted = {f"model.layers.{i}.{name}.{part}" for i in range(3) for name in named for part in parts}
    assert quantizers == wanted | {f"model.layers.{i}.self_attn.key_cache.act_centre" for i in range(3)}
    heads = json.loads((run / "export" / "config.json").read_text())["num_key_value_heads"]
    assert all(len(packed[f"model.layers.{i}.self_attn.key_cache.act_centre"]) == heads for i in range(3))


def test_quantizers_are_those_of_the_loaded_model(run):
    from transformers import AutoModelForCausalLM

    import lbllm_cli.hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(run / "export")
    tensors = reader.read_folder(run / "export")
    names = [name.removesuffix(".act_zero") for name in tensors if name.endswith(".act_zero")]
    assert len(names) == 18
    for name in names:
        wanted = model.get_submodule(name).tables
        for found, part in zip(reader.tables(tensors, name), wanted, strict=True):
            assert np.array_equal(found, part.numpy()), name


@pytest.mark.parametrize(
    ("levels", "zero"),
    [(EIGHT), (SIXTEEN), ([[0, 1, 2, 3, 4, 5, 6, 7]], [0]), (uniform_levels(3), None), (uniform_levels(4), None)],
    ids=["knee-3", "knee-4", "one-sided", "uniform-3", "uniform-4"],
)
def test_quantizing_gives_the_same_codes_steps_and_records(levels, zero):
    # Eighths: sums are exact in any order. A group of zeros, groups of one sign, a large value beside small ones.
    x = torch.randint(-40, 41, (2, 3, 5, 40), generator=torch.Generator().manual_seed(1)).float() / 8
    x[0, 0, 0, :20], x[0, 0, 1], x[0, 0, 2], x[0, 1, :, 7], x[0, 2, :, 21] = 0, x[0, 0, 1].abs(), -x[0, 0, 2].abs(), 100, -90
    clip = torch.tensor([[65536, 60000], [50000, 65536]])[: len(levels)].int()
    zeros = torch.empty(0, dtype=torch.uint8) if zero is None else torch.tensor(zero, dtype=torch.uint8)
    levels = torch.as_tensor(levels, dtype=torch.uint8)
    own = Tables(levels, None if zero is None else zeros, clip.float() / 65536)
    stored = {"q.act_levels": levels.numpy(), "q.act_zero": zeros.numpy(), "q.act_clip": clip.numpy()}
    tables = reader.tables(stored, "q")

    groups = split_groups(x, 20)
    wanted = quantize(groups, own)
    assert zero is None or len(zero) == 1 or set(wanted.table.flatten().tolist()) == {0, 1}
    for place in np.ndindex(groups.shape[:-1]):
        codes, step, z, table = reader.quantize(groups[place].numpy(), *tables)
        assert codes.tolist() == wanted.codes[place].tolist(), place
        assert np.float32(step) == wanted.step[place].item(), place
        assert (z, table) == (int(wanted.zero[place]), int(wanted.table[place])), place

    records = write_record(x, own, 20)
    bits = (levels.shape[1] - 1).bit_length()
    found = reader.cached(records.numpy().reshape(2, 3, 5, 2, -1), tables[0], tables[1], bits, 20).reshape(x.shape)
    assert found.tobytes() == read_record(records, own, 20, 40).numpy().tobytes()


def test_every_key_is_specified(run, finished):
    config = json.loads((run / "export" / "config.json").read_text())["quantization_config"]
    assert documented("config.json") == config.keys() | config["activations"].keys() | {"level_bits", "head_bits", "group_sizes"}
    assert config["format_version"] == 4
    manifest = json.loads((run / "act-calib" / "lbllm_stage.json").read_text())
    of_the_recipe = {name for name in manifest["inputs"] if name.startswith("act_calib.")}
    inputs = {name.replace("data.training", "<text>") for name in manifest["inputs"].keys() - of_the_recipe}
    assert documented("lbllm_stage.json") == manifest.keys() | inputs | {"level_bits", "group_sizes", "ranks"}
    record = json.loads((run / "export" / "lbllm_export.json").read_text())
    assert documented("lbllm_export.json") == record.keys() | {"head_bits"}
    assert (record["format_version"], manifest["format_version"]) == (4, 3)
    plain = json.loads((finished("ptq")[1] / "ptq" / "lbllm_stage.json").read_text())
    assert "activations" not in plain
    assert plain["parent"] is None
    assert "parent.files" not in plain["inputs"]


def test_weights_alone_are_version_1(finished, tmp_path, ok):
    _, folder = finished("ptq")
    shutil.copytree(folder, tmp_path / "run")
    ok("export", "--recipe", folder.parent / "r.yaml", f"output.dir={tmp_path / 'run'}")
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1
    assert "activations" not in config


def test_hashes_are_what_the_specification_says(run):
    for stage, before in (("ptq", None), ("act-calib", "ptq")):
        manifest = json.loads((run / stage / "lbllm_stage.json").read_text())
        assert manifest["fingerprint"] == hash_of(manifest["inputs"])
        for name, wanted in manifest["files"].items():
            assert hashlib.sha256((run / stage / name).read_bytes()).hexdigest() == wanted
        if before is not None:
            parent = json.loads((run / before / "lbllm_stage.json").read_text())
            assert manifest["parent"] == {"stage": before, "fingerprint": parent["fingerprint"]}
            assert manifest["inputs"]["parent.files"] == hash_of(parent["files"])
    record = json.loads((run / "export" / "lbllm_export.json").read_text())
    assert record["checkpoint"] == hash_of(manifest["files"])
    assert record["fingerprint"] == hash_of({key: record[key] for key in ("checkpoint", "format", "shard_bytes")})
    for name, wanted in record["files"].items():
        assert hashlib.sha256((run / "export" / name).read_bytes()).hexdigest() == wanted


def test_a_models_hash_is_what_the_specification_says(run):
    folder = run.parent / "model"
    tensors = json.loads((data := (folder / "model.safetensors").read_bytes())[8 : 8 + int.from_bytes(data[:8], "little")])
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in sorted(tensors.keys() - {"__metadata__"}):
        digest.update(f"{name} {tensors[name]['dtype']} {tuple(tensors[name]['shape'])}".encode())
    digest.update(data[:65536] + data[-65536:])
    manifest = json.loads((run / "ptq" / "lbllm_stage.json").read_text())
    assert manifest["inputs"]["model.files"] == digest.hexdigest()
