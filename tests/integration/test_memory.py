"""The model is never whole in memory: the peak does not grow with the number of blocks."""

import json
import subprocess
import sys

import pytest
from conftest import save_toy, write_recipe

RUN = (
    "import sys, torch\n"
    "torch.set_num_threads(1)\n"
    "from lbllm_cli.cli.app import app\n"
    "app(sys.argv[1:], standalone_mode=False)\n"
    "from lbllm_cli.pipeline.reporter import peak_ram\n"
    "print('peak', peak_ram())\n"
)
SIZES = {"hidden_size": 384, "intermediate_size": 768, "head_dim": 48, "num_attention_heads": 8}

QUICK = {"rounds": 0, "em_iterations": 2, "group_size": 128}


def peak(*arguments: str) -> int:
    result = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True)
    return int(result.stdout.split("peak ")[1])


@pytest.mark.slow
def test_peak_memory_is_independent_of_the_number_of_blocks(ok, tmp_path):
    measured = {}
    for blocks in (4, 16):
        folder = save_toy(tmp_path / f"model{blocks}", num_hidden_layers=blocks, **SIZES)
        recipe = write_recipe(tmp_path / f"{blocks}.yaml", folder, tmp_path / f"run{blocks}", ptq=QUICK)
        # A process of its own only where its peak is looked at: starting one takes longer than the four blocks.
        (ok if blocks == 4 else peak)("ptq", "--recipe", str(recipe))
        measured["eval", blocks] = peak("eval", "--recipe", str(recipe))
        measured["weights", blocks] = (folder / "model.safetensors").stat().st_size
    more_weights = measured["weights", 16] - measured["weights", 4]
    assert more_weights > 60e6
    # Measured: -6 to 9 MB.
    assert measured["eval", 16] - measured["eval", 4] < 0.25 * more_weights, measured
    # The allocator reaches its plateau after four or five blocks (some 20 MB more than after one), so that two
    # models of different depth do not compare; the second half of one does. Measured: 0 to 8 MB of 40.
    peaks = [json.loads(line)["peak_ram_bytes"] for line in (tmp_path / "run16/ptq/events.jsonl").read_text().splitlines()]
    assert len(peaks) == 16
    assert peaks[-1] - peaks[7] < 0.5 * more_weights * 8 / 12, peaks


# Samples of the memory that no file backs: mapped weight files may be dropped by the system at any time.
SAMPLED = (
    "import threading, time\n"
    "def sample():\n"
    "    while True:\n"
    "        kib = int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])\n"
    "        most[0] = max(most[0], kib * 1024)\n"
    "        time.sleep(0.005)\n"
    "most = [0]\n"
    "threading.Thread(target=sample, daemon=True).start()\n"
)


@pytest.mark.slow
def test_eval_holds_less_than_half_of_a_models_weights(tmp_path):
    folder = save_toy(tmp_path / "model", num_hidden_layers=20, hidden_size=1024, intermediate_size=4096, head_dim=64)
    recipe = write_recipe(tmp_path / "r.yaml", folder, tmp_path / "run", ptq={"rounds": 0})
    weights = (folder / "model.safetensors").stat().st_size
    assert weights > 1e9
    code = SAMPLED + RUN.replace("peak_ram()", "most[0]")
    command = [sys.executable, "-c", code, "eval", "--recipe", str(recipe)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    # Measured: 382 MB, most of them of Python and torch.
    most = int(result.stdout.split("peak ")[1])
    assert most < weights / 2, most
