"""`lm_eval --model vllm` on a packed export gives the scores that `lbllm eval` does."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT, save_toy
from named_vllm import named_vllm
from packed_models import exported

pytest.importorskip("vllm", reason="vLLM is not installed here: make serve-test")

from lbllm_cli.evaluation.tasks import open_lm, plan_tasks, run_task
from lbllm_cli.hf import quantize_activations

pytestmark = pytest.mark.slow
LIMIT = 40
TASKS = ("continuation", "last_word")


def listened(lm: Any) -> list[float]:
    """What it says of likelihoods from now on, in the order of the requests."""
    said: list[float] = []
    answer = lm.loglikelihood

    def listening(*args: Any, **kwargs: Any) -> Any:
        found = answer(*args, **kwargs)
        said.extend(likelihood for likelihood, _ in found)
        return found

    lm.loglikelihood = listening
    return said


def test_scores_are_equal(tmp_path):
    """Of lm-eval's own command line. Activations in full precision: codes that tip over change likelihoods, and some choices."""
    toy = save_toy(tmp_path / "model", "llama-tied", head_dim=32, hidden_size=128, max_position_embeddings=2048)
    folder = exported(tmp_path, toy, ptq={"rounds": 0})
    lm = open_lm(folder, torch.float32, torch.device("cpu"), 4, False)
    quantize_activations(lm.model, False)
    tasks = plan_tasks([f"builtin:{name}" for name in TASKS], None)
    said = listened(lm)
    ours = {}
    for task in tasks:
        scores = run_task(lm, task, LIMIT)["results"][task.name]
        ours[task.name] = scores, said.copy()
        said.clear()

    options = {
        "pretrained": str(folder), "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 26,
        "additional_config": {"lbllm_activations": "full"},
    }  # fmt: skip
    command = [sys.executable, "-m", "lm_eval", "--model", "vllm", "--model_args", json.dumps(options), "--limit", str(LIMIT)]
    command += ["--tasks", ",".join(f"{name}.yaml" for name in TASKS), "--output_path", str(tmp_path / "theirs"), "--log_samples"]
    told = {**named_vllm(tmp_path / "named"), "HF_DATASETS_CACHE": str(tmp_path / "datasets"), "OMP_NUM_THREADS": "1"}
    place = ROOT / "src" / "lbllm_cli" / "data" / "tasks"
    done = subprocess.run(command, cwd=place, env=told, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]
    for name, (own, likelihoods) in ours.items():
        metrics = [key for key, value in own.items() if isinstance(value, float) and "stderr" not in key]
        assert metrics
        assert {key: theirs[name][key] for key in metrics} == {key: own[key] for key in metrics}
        (samples,) = (tmp_path / "theirs").rglob(f"samples_{name}_*.jsonl")
        items = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda item: item["doc_id"])
        found = [float(answer[0][0]) for item in items for answer in item["resps"]]
        assert len(found) == len(likelihoods) >= LIMIT
        # Measured 5.3e-5, of a likelihood of -178.
        assert found == pytest.approx(likelihoods, abs=3e-4)
