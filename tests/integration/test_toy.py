"""The trained toy: perplexities that mean something, with the measured value beside each limit."""

import json

import pytest
from conftest import TOY, write_recipe
from stages import events
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


@pytest.fixture
def experts(ok, tmp_path):
    """experts(*commands): results of `eval` after them, of the trained mixture of experts."""

    def run(*commands: str) -> dict:
        data = {
            "calibration": CALIBRATION, "training": {**CALIBRATION, "sequences": 48}, "evaluation": EVALUATION[:1],
        }  # fmt: skip
        recipe = write_recipe(
            tmp_path / "r.json", TOY.parent / "toy-experts", tmp_path / "run", data=data, ptq={"group_size": 64},
            distill={"epochs": 2}, act_calib={"epochs": 1, "soft": 0},
        )  # fmt: skip
        for command in commands:
            ok(command, "--recipe", recipe)
        return json.loads(ok("eval", "--recipe", recipe, "--json").stdout)

    return run


def of_base(found: dict, stage: str) -> float:
    return found[stage]["perplexity"]["novels"] / found["base"]["perplexity"]["novels"]


@pytest.mark.slow
def test_two_bits_cost_little_on_a_mixture_of_experts(experts, tmp_path):
    """And where tokens go beside where the teacher's go. Twelve sequences are 768 tokens for each of eight experts."""
    found = experts("ptq")
    assert found["base"]["perplexity"]["novels"] == pytest.approx(31.53, rel=0.005)
    assert 1 < of_base(found, "ptq") < 1.15  # measured 1.106
    assert found["ptq"]["routing"]["novels"] > 0.9  # measured 0.933
    for record in events(tmp_path / "run" / "ptq"):
        sent = [record["linears"][f"mlp.experts.{number}.up_proj"]["tokens"] for number in range(8)]
        assert sum(sent) == 2 * 12 * 256
        few = {f"mlp.experts.{number}": tokens for number, tokens in enumerate(sent) if tokens < 128}
        assert record.get("starved", {}) == few


@pytest.mark.slow
def test_a_mixture_of_experts_through_all_stages(experts):
    found = experts("ptq", "distill", "act-calib")
    assert of_base(found, "distill") < of_base(found, "ptq") < 1.15  # measured 1.086, 1.106
    assert of_base(found, "act-calib") < 1.15  # measured 1.107
    assert all(found[stage]["routing"]["novels"] > 0.9 for stage in ("ptq", "distill", "act-calib"))


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
