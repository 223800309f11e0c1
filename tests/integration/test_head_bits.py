"""Embedding and head in 8 bits: what is stored, who reads it, and what it computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_toy
from packed_models import ROUNDING, exported, ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lbllm_cli.hf  # noqa: F401 - registers the packed format
from docs import reader
from lbllm_cli.format.rows import dequantize_rows
from lbllm_cli.format.settings import check_settings

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
FAMILIES = ("llama-tied", "llama-untied", "gemma3", "mixtral")


@pytest.fixture(scope="module")
def folders(once):
    """folders(family): an export with embedding and head in 8 bits, and one of the same stage with them as they are."""

    def of(family: str) -> tuple[Path, Path]:
        def make(folder: Path) -> tuple[Path, Path]:
            toy = save_toy(folder / "model", family)
            sixteen = exported(folder, toy, ptq={"rounds": 0})
            shutil.copytree(sixteen, folder / "sixteen")
            eight = exported(folder, toy, ptq={"rounds": 0}, export={"head_bits": 8})
            return eight, folder / "sixteen"

        return once(f"head-bits-{family}", make)

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_other_export_with_rounded_tables(folders, family):
    eight, sixteen = folders(family)
    config = json.loads((eight / "config.json").read_text())["quantization_config"]
    assert (config["format_version"], config["head_bits"]) == (5, 8)
    assert "head_bits" not in json.loads((sixteen / "config.json").read_text())["quantization_config"]
    found, wanted = load_file(eight / "model.safetensors"), load_file(sixteen / "model.safetensors")
    tables = [name for name in (EMBEDDING, HEAD) if f"{name}.weight" in wanted]
    assert len(tables) == (1 if json.loads((eight / "config.json").read_text())["tie_word_embeddings"] else 2)
    for name in tables:
        codes, scale = found.pop(f"{name}.weight"), found.pop(f"{name}.scale")
        assert (codes.dtype, scale.dtype) == (torch.int8, torch.float16)
        dense, source = dequantize_rows(codes, scale, torch.float32), wanted.pop(f"{name}.weight")
        assert (dense - source).norm() < 0.01 * source.norm()
        assert reader.rows(reader.read_folder(eight), name).tobytes() == dense.numpy().tobytes()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_transformers_computes_with_the_rounded_tables(folders, family, dtype, tmp_path):
    eight, sixteen = folders(family)
    tensors = load_file(eight / "model.safetensors")
    dense = {
        f"{name}.weight": dequantize_rows(tensors[f"{name}.weight"], tensors[f"{name}.scale"], torch.float32)
        for name in (EMBEDDING, HEAD)
        if f"{name}.weight" in tensors
    }
    rounded = shutil.copytree(sixteen, tmp_path / "dense")
    save_file(load_file(sixteen / "model.safetensors") | dense, rounded / "model.safetensors", metadata={"format": "pt"})
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for folder in (eight, rounded))
    assert model.get_input_embeddings().weight.dtype == dtype
    tied = model.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(model(ids(2, 20)).logits, reference(ids(2, 20)).logits)
    # A folder that it is saved to has them as the model has.
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype).eval()
    assert torch.equal(again(ids(2, 20)).logits, model(ids(2, 20)).logits)


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied"])
@torch.no_grad()
def test_the_native_engine_computes_the_same(folders, family):
    from lbllm_cli.engine.location import library_path
    from lbllm_cli.engine.model import Model, Session

    if library_path() is None:
        pytest.skip("this installation has no compiled kernels")
    eight, _ = folders(family)
    reference = AutoModelForCausalLM.from_pretrained(eight, dtype=torch.float32).eval()
    session, cache, differences = Session(Model(eight, 1)), None, []
    for token in ids(1, 12)[0].tolist():
        output = reference(torch.tensor([[token]]), past_key_values=cache)
        cache, wanted = output.past_key_values, output.logits[0, -1]
        differences.append(float((torch.from_numpy(session.run([token]).copy()) - wanted).abs().mean() / wanted.abs().mean()))
    assert sorted(differences)[6] < ROUNDING


def test_it_is_an_export_of_its_own(folders, lbllm):
    eight, _ = folders("llama-tied")
    recipe = eight.parents[1] / "r.yaml"
    assert "up to date" in lbllm("export", "--recipe", recipe).stderr
    assert "would write" in lbllm("export", "--recipe", recipe, "export.head_bits=16", "--dry-run").stderr
    assert lbllm("export", "--recipe", recipe, "export.head_bits=6").exit_code == 2


def test_formats_of_other_programs_have_what_the_source_has(folders, ok, tmp_path):
    run = shutil.copytree(folders("llama-tied")[0].parent, tmp_path / "run")
    ok("export", "--recipe", folders("llama-tied")[0].parents[1] / "r.yaml", "export.format=dense", f"output.dir={run}")
    config = json.loads((run / "export" / "config.json").read_text())
    assert "quantization_config" not in config
    found = load_file(run / "export" / "model.safetensors")
    source = load_file(folders("llama-tied")[0].parents[1] / "model" / "model.safetensors")
    assert torch.equal(found[f"{EMBEDDING}.weight"], source[f"{EMBEDDING}.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_bits": 4}, "head_bits: expected 8 or 16, got 4"),
        ({"format_version": 4}, "format_version: expected 5 where embedding and head have 8 bits, got 4"),
    ],
)
def test_settings_that_are_none(changes, message):
    settings = {"format_version": 5, "group_size": 32, "linears": ["a"], "head_bits": 8}
    check_settings(settings)
    with pytest.raises(ValueError, match=message):
        check_settings({**settings, **changes})


@pytest.mark.parametrize("change", [{"scale": None}, {"scale": torch.float32}, {"weight": torch.uint8}])
def test_folders_without_what_their_settings_say(folders, tmp_path, change):
    folder = shutil.copytree(folders("llama-tied")[0], tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    for part, dtype in change.items():
        name = f"{EMBEDDING}.{part}"
        tensors[name] = tensors[name].to(dtype) if dtype else tensors.pop(name)
        if dtype is None:
            del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{EMBEDDING}\.\w+: expected"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_measured_sizes_count_them(folders, ok):
    eight, sixteen = folders("llama-untied")
    recipe = eight.parents[1] / "r.yaml"
    ok("eval", "--recipe", recipe, "eval.checkpoints=[export]")
    found = json.loads((eight.parent / "eval" / "results.json").read_text())["export"]
    assert found["bytes"] == (eight / "model.safetensors").stat().st_size
    assert found["bytes"] < (sixteen / "model.safetensors").stat().st_size
