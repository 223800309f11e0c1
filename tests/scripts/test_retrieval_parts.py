"""scripts/retrieval_parts.py: what is found again depends on the linears that a row names, and on no others."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, save_toy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TOY = ROOT / "tests/assets/toy"
LIMIT = 2


@torch.no_grad()
def by_hand(folder) -> float:
    """Mean nats of the numbers, a token at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    lines = (ROOT / "src/lbllm_cli/data/tasks/retrieval.jsonl").read_text().splitlines()[:LIMIT]
    total = 0.0
    for item in map(json.loads, lines):
        ids = tokenizer(item["context"], add_special_tokens=False)["input_ids"]
        for token in tokenizer(" " + item["number"], add_special_tokens=False)["input_ids"]:
            total -= float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(0)[token])
            ids.append(token)
    return total / LIMIT


def test_a_row_quantizes_what_it_names(tmp_path, script):
    other = tmp_path / "export"
    shutil.copytree(TOY, other)
    weights = load_file(other / "model.safetensors")
    for name, weight in weights.items():
        if "layers.0.self_attn.q_proj" in name or "layers.0.self_attn.v_proj" in name:
            weight.mul_(-0.5)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    done = script("retrieval_parts", "--export", other, "--model", TOY, "--limit", LIMIT, "--dtype", "float32")
    assert done.code == 0, done.err
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.out.splitlines()[2:]]
    nats = {row: float(cell.split()[0]) for row, _, cell in lines}
    # Printed with three decimals.
    assert nats["nothing"] == pytest.approx(by_hand(TOY), abs=1e-3)
    assert nats["all"] == pytest.approx(by_hand(other), abs=1e-3)
    for row in ("gate, up, down", "second third", "last third"):
        assert nats[row] == nats["nothing"]
    for row in ("first third of the blocks", "all"):
        assert nats[row] == nats["all"]
    assert nats["q, k"] != nats["nothing"] != nats["v, o"]
    assert nats["all but q, k"] == nats["v, o"] != nats["q, k"]
    assert nats["all but attention"] == nats["nothing"]


def test_what_no_row_can_be_made_of_is_refused(tmp_path, script):
    fused = save_toy(tmp_path / "fused", "phi3")
    for folder, more, message in (
        (TOY, ["--only", "k"], "--only: k; rows are: nothing; all;"),
        (TOY, ["--limit", "1"], "--limit: 1; a standard error takes two passages"),
        (fused, [], "self_attn.qkv_proj.weight is none of"),
    ):
        wrong = script("retrieval_parts", "--export", folder, "--model", folder, *more)
        assert wrong.code == 2
        assert message in wrong.err
