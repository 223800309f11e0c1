"""The trained toy: perplexities that mean something, with the measured value beside each limit."""

import json

import pytest
from conftest import TOY, write_recipe
from typer.testing import CliRunner

from lbllm_cli.cli.app import app

EVALUATION = [
    {"name": style, "source": f"builtin:evaluation/{style}", "length": 256, "segments": 12} for style in ("novels", "technical")
]
CALIBRATION = {"source": "builtin:calibration", "sequences": 12, "length": 256}


@pytest.fixture(scope="module")
def perplexity(tmp_path_factory):
    """perplexity(name, **ptq settings): of the toy after ptq, novels and technical prose; name "base": before."""
    base = tmp_path_factory.mktemp("toy")
    known: dict[str, dict[str, float]] = {}

    def measure(name: str, **settings) -> dict[str, float]:
        if name not in known:
            data = {"calibration": CALIBRATION, "evaluation": EVALUATION}
            ptq = {"group_size": 64, **settings}
            recipe = str(write_recipe(base / f"{name}.yaml", TOY, base / name, data=data, ptq=ptq))
            stage = "base" if name == "base" else "ptq"
            for command in (["ptq"] if stage == "ptq" else []) + ["eval"]:
                extra = [f"eval.checkpoints=[{stage}]", "--json"] if command == "eval" else []
                result = CliRunner().invoke(app, [command, "--recipe", recipe, *extra], catch_exceptions=False)
                assert result.exit_code == 0, result.stderr
            known[name] = json.loads(result.stdout)[stage]["perplexity"]
        return known[name]

    return measure


def test_base_is_the_model_that_was_trained(perplexity):
    base = perplexity("base")
    assert base["novels"] == pytest.approx(31.20, rel=0.005)  # measured 31.2022, CPU float32
    assert base["technical"] == pytest.approx(31.02, rel=0.005)  # measured 31.0196


def test_two_bits_cost_little_on_the_toy(perplexity):
    base, ptq = perplexity("base"), perplexity("default")
    assert base["novels"] < ptq["novels"] < 1.18 * base["novels"]  # measured 1.140
    assert base["technical"] < ptq["technical"] < 1.22 * base["technical"]  # measured 1.176


@pytest.mark.slow
def test_each_part_of_the_method_earns_its_place(perplexity):
    default = perplexity("default")
    crude = perplexity("crude", levels="quantile", rounds=0)
    assert crude["novels"] > 1.10 * default["novels"]  # measured 1.157
    uncompensated = perplexity("uncompensated", levels="quantile", compensation=False, rounds=0, asymmetric=0)
    assert uncompensated["novels"] > 1.05 * crude["novels"]


@pytest.mark.slow
def test_larger_groups_cost_little(perplexity):
    assert perplexity("group 128", group_size=128)["novels"] < 1.05 * perplexity("default")["novels"]  # measured 0.997
