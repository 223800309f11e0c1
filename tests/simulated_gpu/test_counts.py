"""What is counted at the true shape of a large model: as arithmetic says, and no more than was recorded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from simulated_gpu import build
from simulated_gpu.accounting import Accounts
from simulated_gpu.sampling import sampled

SCRIPT = ROOT / "scripts" / "bench" / "device_counts.py"
BUDGETS = json.loads(Path(__file__).with_name("budgets.json").read_text(encoding="utf-8"))
# What counts may exceed what was recorded by: shapes of temporary tensors move with versions of torch and transformers.
MARGIN = 0.03
STAGES = ("ptq", "distill", "act-calib", "table-search")
MODELS = ("decode", "decode-bf16", "decode-weights-only", "prefill")
WHOLE = ("distill-end-to-end", "act-calib-end-to-end")

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler for the guard")]


def counted(folder: Path, *arguments: object) -> dict[str, dict]:
    """What the script says of some things of LLaMA-2-7B, or of another model."""
    found = folder / "counts.json"
    command = [sys.executable, SCRIPT, *map(str, arguments), "--json", found]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(found.read_text(encoding="utf-8"))["things"]


def exceeding(found: dict, budget: dict) -> list[str]:
    """What was counted beyond its budget."""
    said = [f"peak {found['peak']:,}, recorded {budget['peak']:,}"] if found["peak"] > budget["peak"] * (1 + MARGIN) else []
    for name, phase in found["phases"].items():
        limits = budget["phases"].get(name)
        if limits is None:
            said.append(f"{name} is not recorded")
            continue
        counts = {"kernels": phase["kernels"], "waits": sum(phase["syncs"].values()), "bytes": phase["read"] + phase["written"]}
        over = {key: n for key, n in counts.items() if n > limits[key] * (1 + MARGIN)}
        said += [f"{name}: {n:,.0f} {key}, recorded {limits[key]:,}" for key, n in over.items()]
    return said


@pytest.mark.parametrize("things", [STAGES, MODELS, pytest.param(WHOLE, marks=pytest.mark.slow)], ids="+".join)
def test_counts_stay_within_their_budgets(tmp_path, things):
    for thing, found in counted(tmp_path, "llama2-7b", *things).items():
        assert exceeding(found, BUDGETS[thing]) == [], f"{thing}: scripts/bench/device_counts.py --record, if that is meant"
        assert found["broken"] == []


def test_every_thing_has_a_budget():
    assert set(BUDGETS) == {*STAGES, *MODELS, *WHOLE}


def test_a_model_of_another_shape_does_what_arithmetic_says(tmp_path):
    """One training step of a block: forward once, gradients of weights once, and of inputs but the first unit's."""
    hidden, inner, heads, length, layers = 512, 1024, 8, 2048, 2
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": layers, "vocab_size": 1000,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = counted(tmp_path, "--model-config", tmp_path / "config.json", "distill")["distill"]
    first, weights = 3 * hidden * hidden, 4 * hidden * hidden + 3 * hidden * inner
    products = 2 * length * (3 * weights - first)
    # Two products of half a square forward, five on the way back.
    attention = 2 * length * length * hidden * (1 + 2.5)
    step = found["phases"]["step"]
    # Seven of eight sequences are trained on, two in a step.
    assert step["flops"] == {"bf16": pytest.approx(7 * (products + attention), rel=1e-6)}
    assert step["times"] == 4
    assert found["forecast"] > found["peak"] > 0


def test_sampled_rounds_count_for_all():
    accounts, rounds, total = Accounts(), [], 0.0
    for number in sampled(accounts)(3, 103, 2):
        rounds.append(number)
        total += accounts.weight * (7 + 5 * number)
    assert (len(rounds), accounts.weight) == (3, 1)
    assert total == pytest.approx(sum(7 + 5 * number for number in range(3, 103, 2)), rel=0.02)
    assert list(sampled(accounts)(4)) == [0, 1, 2, 3]
