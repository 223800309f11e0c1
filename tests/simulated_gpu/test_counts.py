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
# And the share of it below which a kernel, or a part of the work, was left out.
LEAST = 0.8
QUICK = ("ptq", "distill", "act-calib", "decode")
REST = (
    "table-search", "decode-bf16", "decode-weights-only", "prefill", "distill-end-to-end", "act-calib-end-to-end",
)  # fmt: skip

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler for the guard")]


def counted(folder: Path, *arguments: object) -> dict[str, dict]:
    """What the script says of some things of LLaMA-2-7B, or of another model."""
    folder.mkdir(exist_ok=True)
    found = folder / "counts.json"
    command = [sys.executable, SCRIPT, *map(str, arguments), "--json", found]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(found.read_text(encoding="utf-8"))["things"]


def exceeding(found: dict, budget: dict) -> list[str]:
    """What was counted beyond its budget, or is so little of it that something cannot have been done."""
    said = [f"peak {found['peak']:,}, recorded {budget['peak']:,}"] if found["peak"] > budget["peak"] * (1 + MARGIN) else []
    said += [f"{name} is recorded and was not counted" for name in budget["phases"].keys() - found["phases"].keys()]
    for name, phase in found["phases"].items():
        limits = budget["phases"].get(name)
        if limits is None:
            said.append(f"{name} is not recorded")
            continue
        counts = {"kernels": phase["kernels"], "waits": sum(phase["syncs"].values()), "bytes": phase["read"] + phase["written"]}
        over = {key: n for key, n in counts.items() if not LEAST * limits[key] <= n <= limits[key] * (1 + MARGIN)}
        said += [f"{name}: {n:,.0f} {key}, recorded {limits[key]:,}" for key, n in over.items()]
    return said


@pytest.fixture(scope="module")
def quick(simulated, tmp_path_factory) -> dict[str, dict]:
    """Counts of what is counted fast, each in a child of the process that has the device."""
    folder, found = tmp_path_factory.mktemp("counts"), {}
    for thing in QUICK:
        text = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
device.shape = device.counting = True
from random_models import config_of
from true_shapes import count
folder = Path({str(folder)!r})
facts = count(device, {thing!r}, config_of("llama2-7b"), folder, [])
(folder / "counts.json").write_text(json.dumps(facts))
"""
        done = simulated.python(text, kernels="auto")
        assert done.code == 0, done.stderr
        found[thing] = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    return found


def within_budgets(things: dict[str, dict]) -> None:
    for thing, found in things.items():
        assert exceeding(found, BUDGETS[thing]) == [], f"{thing}: scripts/bench/device_counts.py --record, if that is meant"
        assert found["broken"] == []


def test_counts_of_nothing_are_not_within_a_budget():
    budget = {"peak": 100, "phases": {"step": {"kernels": 10, "waits": 0, "bytes": 1000}}}
    step = {"kernels": 10, "syncs": {}, "read": 600, "written": 400}
    assert exceeding({"peak": 90, "phases": {"step": step}}, budget) == []
    assert exceeding({"peak": 0, "phases": {}}, budget) == ["step is recorded and was not counted"]
    assert exceeding({"peak": 90, "phases": {"step": {**step, "kernels": 7}}}, budget) == ["step: 7 kernels, recorded 10"]
    assert exceeding({"peak": 90, "phases": {"step": {**step, "read": 700}}}, budget) == ["step: 1,100 bytes, recorded 1,000"]


def test_counts_stay_within_their_budgets(quick):
    within_budgets(quick)


@pytest.mark.slow
def test_counts_of_the_rest_stay_within_their_budgets(tmp_path):
    within_budgets(counted(tmp_path, "llama2-7b", *REST))


def test_every_thing_has_a_budget():
    assert set(BUDGETS) == {*QUICK, *REST}


def test_training_steps_do_what_arithmetic_says(quick):
    """Products of a step of distill: forward once, gradients of weights once, and of inputs but the first unit's."""
    step = quick["distill"]["phases"]["step"]
    assert step["flops"] == {"bf16": pytest.approx(_products(4096, 11008), rel=1e-6)}
    assert step["times"] == 4


def _products(hidden: int, inner: int, length: int = 2048) -> float:
    """Seven of eight sequences are trained on."""
    first, weights = 3 * hidden * hidden, 4 * hidden * hidden + 3 * hidden * inner
    # Two products of half a square forward, five on the way back.
    attention = 2 * length * length * hidden * (1 + 2.5)
    return 7 * (2 * length * (3 * weights - first) + attention)


@pytest.mark.slow
def test_a_model_of_another_shape_is_counted(tmp_path):
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1024,
        "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2, "vocab_size": 1000,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = counted(tmp_path, "--model-config", tmp_path / "config.json", "distill", "distill.micro_batch_size=2")["distill"]
    assert found["phases"]["step"]["flops"] == {"bf16": pytest.approx(_products(512, 1024), rel=1e-6)}
    assert found["forecast"] > found["peak"] > 0


def test_sampled_rounds_count_for_all():
    accounts, rounds, total = Accounts(), [], 0.0
    for number in sampled(accounts)(3, 103, 2):
        rounds.append(number)
        total += accounts.weight * (7 + 5 * number)
    assert (len(rounds), accounts.weight) == (3, 1)
    assert total == pytest.approx(sum(7 + 5 * number for number in range(3, 103, 2)), rel=0.02)
    assert list(sampled(accounts)(4)) == [0, 1, 2, 3]
