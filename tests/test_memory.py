"""The model is never whole in memory: the peak does not grow with the number of blocks."""

import subprocess
import sys

from conftest import save_toy, write_recipe

RUN = (
    "import sys, torch\n"
    "torch.set_num_threads(1)\n"
    "from lbllm_cli.cli import app\n"
    "app(sys.argv[1:], standalone_mode=False)\n"
    "from lbllm_cli.report import peak_ram\n"
    "print('peak', peak_ram())\n"
)
SIZES = {"hidden_size": 384, "intermediate_size": 768, "head_dim": 48, "num_attention_heads": 8}

QUICK = {"rounds": 0, "em_iterations": 2, "group_size": 128}


def peak(*arguments: str) -> int:
    result = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True)
    return int(result.stdout.split("peak ")[1])


def test_peak_memory_is_independent_of_the_number_of_blocks(tmp_path):
    peaks = {}
    for blocks in (4, 16):
        folder = save_toy(tmp_path / f"model{blocks}", num_hidden_layers=blocks, **SIZES)
        weights = (folder / "model.safetensors").stat().st_size
        recipe = write_recipe(tmp_path / f"{blocks}.yaml", folder, tmp_path / f"run{blocks}", ptq=QUICK)
        peaks[blocks] = {c: peak(c, "--recipe", str(recipe)) for c in ("ptq", "eval")}
        peaks[blocks]["weights"] = weights
    more_weights = peaks[16]["weights"] - peaks[4]["weights"]
    assert more_weights > 60e6
    for command in ("ptq", "eval"):
        assert peaks[16][command] - peaks[4][command] < 0.25 * more_weights, peaks
