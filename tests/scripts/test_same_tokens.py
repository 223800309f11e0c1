"""The script that compares exports finds those of one checkpoint alike, and another checkpoint's not."""

import subprocess
import sys

import pytest
from conftest import ROOT, save_toy, write_recipe


@pytest.mark.heavy
def test_formats_write_the_same_and_another_model_does_not(ok, tmp_path):
    toy = save_toy(tmp_path / "toy", hidden_size=128, intermediate_size=160, head_dim=32)

    def exported(name: str, form: str, *keys: str) -> str:
        recipe = write_recipe(tmp_path / f"{name}.yaml", toy, tmp_path / name, ptq={"rounds": 0})
        ok("ptq", "--recipe", recipe, *keys)
        ok("export", "--recipe", recipe, f"export.format={form}", *keys)
        return str(tmp_path / name / "export")

    folders = [exported(form, form) for form in ("packed", "compressed-tensors", "gguf", "dense")]
    command = [sys.executable, ROOT / "scripts" / "same_tokens.py", "--tokens", "24"]
    done = subprocess.run([*command, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": the same: ") == 4
    other = exported("other", "dense", "ptq.levels=quantile")
    done = subprocess.run([*command, folders[0], other], capture_output=True, text=True)
    assert done.returncode == 1
    assert "other/export: differs from token " in done.stdout
