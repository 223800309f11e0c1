"""`lm_eval --model vllm` on a packed export gives the scores that `lbllm eval` does."""

import os
from importlib import metadata

import pytest
import torch
from conftest import save_toy
from packed_models import exported

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
pytest.importorskip("vllm", reason="vLLM is not installed here: make serve-test")

import lm_eval

from lbllm_cli.evaluation.tasks import open_lm, plan_tasks, run_task

pytestmark = pytest.mark.slow
LIMIT = 40


known = metadata.version


def version_of(name: str) -> str:
    """lm-eval asks for vllm's, which a build for CPUs has under another name; vLLM itself looks for `cpu` in the number."""
    try:
        return known(name)
    except metadata.PackageNotFoundError:
        return f"{known(f'{name}-cpu')}+cpu"


@pytest.mark.parametrize("name", ["builtin:continuation", "builtin:last_word"])
def test_scores_are_equal(tmp_path, monkeypatch, name):
    toy = save_toy(tmp_path / "model", "llama-tied", head_dim=32, hidden_size=128, max_position_embeddings=2048)
    folder = exported(tmp_path, toy, ptq={"rounds": 0})
    (task,) = plan_tasks([name], None)
    ours = run_task(open_lm(folder, torch.float32, torch.device("cpu"), 4, False), task, LIMIT)
    options = {"pretrained": str(folder), "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 26}
    monkeypatch.setattr(metadata, "version", version_of)
    theirs = lm_eval.simple_evaluate(model="vllm", model_args=options, tasks=[task.spec], limit=LIMIT, bootstrap_iters=0)
    found = theirs["results"][task.name]
    own = ours["results"][task.name]
    metrics = [key for key, value in own.items() if isinstance(value, float) and "stderr" not in key]
    assert metrics
    # Codes that tip over change a likelihood by as much as another seed would; a choice seldom.
    assert {key: found[key] for key in metrics} == pytest.approx({key: own[key] for key in metrics}, rel=0.05)
