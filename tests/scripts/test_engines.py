"""The script that compares engines finds exports of one checkpoint alike in transformers, and another checkpoint's not.

Other engines: `tests/engines/test_scripts.py`.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from conftest import ROOT, save_toy, write_recipe

FORMATS = ("packed", "compressed-tensors", "gguf", "dense")


SCRIPT = spec_from_file_location("engines", ROOT / "scripts" / "engines.py")
engines = module_from_spec(SCRIPT)
SCRIPT.loader.exec_module(engines)


@pytest.mark.heavy
def test_formats_write_the_same_and_another_model_does_not(ok, tmp_path, monkeypatch, capsys):
    toy = save_toy(tmp_path / "toy", hidden_size=128, intermediate_size=160, head_dim=32)

    def exported(name: str, form: str, *keys: str) -> Path:
        recipe = write_recipe(tmp_path / f"{name}.yaml", toy, tmp_path / name, ptq={"rounds": 0})
        ok("ptq", "--recipe", recipe, *keys)
        ok("export", "--recipe", recipe, f"export.format={form}", *keys)
        return tmp_path / name / "export"

    def run(*arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["engines.py", *map(str, arguments)])
        capsys.readouterr()
        assert engines.main() == 0
        return capsys.readouterr().out.splitlines()

    folders = [*(exported(form, form) for form in FORMATS), exported("other", "dense", "ptq.levels=quantile")]
    text, out = tmp_path / "text.json", tmp_path / "out"
    run("text", folders[0], "--length", 32, "--segments", 2, "--out", text)
    for folder in folders:
        run("run", "transformers", folder, "--full", "--text", text, "--out", out)
    rows = [line.split("|") for line in run("table", "--first", "packed", "--text", text, "--out", out)[2:]]
    apart, same = ({row[1].split()[-1]: float(row[column]) for row in rows} for column in (5, 6))
    assert {same[form] for form in FORMATS} == {64}
    # Of a token's loss at most, in nats: measured 2.9e-6.
    assert max(apart[form] for form in FORMATS) < 1e-5
    assert same["other"] < 64
    assert apart["other"] > 0.1  # measured 2.6
