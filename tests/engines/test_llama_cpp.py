"""GGUF exports in llama.cpp: with the same numbers in float32 it computes what transformers does, in Q8_0 nearly.

llama.cpp is compiled as its binding is installed: `make serve-test`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, save_toy, write_recipe
from transformers import AutoModelForCausalLM

import lbllm_cli.hf  # noqa: F401 - registers the packed format

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp's binding is not installed here: make serve-test")

pytestmark = pytest.mark.slow
TOKENS = torch.randint(3, 90, (24,), generator=torch.Generator().manual_seed(1)).tolist()
SHAPE = {"head_dim": 32, "hidden_size": 128, "intermediate_size": 192}
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 6, "layer_types": None}
FAMILIES = {"gemma3": GEMMA, "llama-tied": {}, "llama-untied": {}, "qwen2-biases": {}, "qwen3": {}}


def script() -> Any:
    spec = importlib.util.spec_from_file_location("engines", ROOT / "scripts" / "engines.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def logits(file: Path) -> np.ndarray:
    model = llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)
    model.eval(TOKENS)
    return np.array(model.scores[: len(TOKENS)])


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(ok, tmp_path, family):
    toy = save_toy(tmp_path / "model", family, **{**SHAPE, **FAMILIES[family]})
    recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", ptq={"rounds": 0})
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0].numpy()
    ok("export", "--recipe", recipe, "export.format=gguf", "--force")
    exact = script().in_float32(tmp_path / "run" / "export", tmp_path / "float32")
    size = np.abs(wanted).mean()
    # Measured 1.2e-6 at most; Gemma 4.8e-3, whose GELU ggml looks up in a table of float16.
    assert np.abs(logits(exact / "model.gguf") - wanted).max() < (2e-2 if family == "gemma3" else 2e-5) * size
    # In Q8_0 activations are rounded to 8 bits: 0.06 at most.
    assert np.abs(logits(tmp_path / "run" / "export" / "model.gguf") - wanted).mean() < 0.1 * size
