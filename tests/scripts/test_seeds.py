"""scripts/seeds.py: means and intervals by hand, and a seed that is measured already."""

import importlib.util
import json
import math

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("seeds", ROOT / "scripts" / "seeds.py")
seeds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(seeds)


def results(base: float, stage: float, kl: float) -> dict:
    return {"base": {"perplexity": {"novels": base}}, "ptq": {"perplexity": {"novels": stage}, "kl": {"novels": kl}}}


def test_an_interval_is_students():
    mean, half = seeds.interval([1.0, 1.1, 1.2])
    assert mean == pytest.approx(1.1)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert seeds.interval([2.0, 2.0]) == (2.0, 0.0)
    assert math.isnan(seeds.interval([1.5])[1])


def test_the_table_has_ratios_of_stages_that_all_seeds_have():
    found = {0: results(10.0, 12.0, 0.2), 1: results(10.0, 14.0, 0.4)}
    found[0]["distill"] = found[0]["ptq"]
    lines = seeds.table(found).splitlines()
    assert lines[0] == "| after | novels | KL novels |"
    assert lines[2:] == ["| ptq | 1.300x ± 1.271 | 0.300 ± 1.271 |"]


def test_a_folder_has_seeds_of_one_recipe_and_its_keys(tmp_path):
    recipe = str(ROOT / "recipes" / "toy.yaml")
    seeds.check_settings(recipe, ["distill.epochs=1"], tmp_path / "out")
    seeds.check_settings(recipe, ["distill.epochs=1"], tmp_path / "out")
    with pytest.raises(SystemExit, match="another recipe or of other keys; choose another --out"):
        seeds.check_settings(recipe, ["distill.epochs=2"], tmp_path / "out")


def test_a_seed_that_is_measured_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds.subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be run"))
    recipe = str(ROOT / "recipes" / "toy.yaml")
    wanted = [stage.name for stage in seeds.load_recipe(seeds.Path(recipe), []).stages]
    texts = [text.name for text in seeds.load_recipe(seeds.Path(recipe), []).data.evaluation]
    measured = {name: {"perplexity": dict.fromkeys(texts, 1.0)} for name in ("base", *wanted)}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text(json.dumps(measured))
    assert seeds.run_seed(recipe, tmp_path, []) == measured
