"""Moments of experts: of routed tokens, against sums by hand; shrinkage; passes; an expert that nothing is sent to."""

import json

import pytest
import torch
from conftest import save_toy, write_recipe
from safetensors.torch import load_file, save_file
from stages import events

from lbllm_cli.models.model import open_model
from lbllm_cli.ptq.moments import InputMoments
from lbllm_cli.ptq.passes import experts_at_once, is_down, matrices, passes_of
from lbllm_cli.ptq.routed import Sent, add_routed, shrunk
from lbllm_cli.recipe.schema import Model, Ptq

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path):
    return open_model(Model(path=str(save_toy(tmp_path / "model", "qwen3-moe"))), CPU)


def test_passes_take_experts_of_a_kind_together(model):
    passes = passes_of(model.units, True, 2)
    assert [len(units) for units in passes] == [1, 1, 2, 2, 1, 2, 2, 1]  # q k v, o, five gates with ups, five downs
    assert [is_down(units[0]) for units in passes[2:]] == [False] * 3 + [True] * 3
    assert sorted(unit for units in passes for unit in units) == sorted(model.units)
    assert passes_of(model.units, False, 2) == [model.units]
    settings = Ptq()
    assert matrices(settings) == 4
    widths = {("mlp.experts.0.gate_proj",): 2048, ("mlp.experts.0.down_proj",): 768, ("self_attn.o_proj",): 4096}
    assert experts_at_once(widths, settings, 20e9) == 74
    assert experts_at_once(widths, settings, 1.0) == 1
    assert experts_at_once({("mlp.down_proj",): 2048}, settings, 0.0) == 1


@torch.no_grad()
def test_moments_are_sums_over_routed_tokens(model):
    teacher, student = model.block(0), model.block(1)
    generator = torch.Generator().manual_seed(0)
    mine, its = (torch.randn(17, 80, generator=generator) for _ in range(2))
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(17)])  # expert 4 gets none
    experts, other = (block.layer.mlp.experts for block in (student, teacher))
    units = [unit for unit in model.units if ".experts." in unit[0]]
    moments = {unit: InputMoments.empty(student.linear(unit[0]).in_features, CPU, True) for unit in units}
    common = {kind: InputMoments.empty(width, CPU, True) for kind, width in ((False, 80), (True, 48))}
    read = {}
    for number in range(4):
        tokens = (chosen == number).any(1).nonzero().flatten()
        read[f"mlp.experts.{number}.down_proj"] = experts.expert(number).inner(mine[tokens])
    add_routed((student, teacher), read, (Sent(mine, chosen), Sent(its, chosen.flip(1))), moments, common)
    for unit in units:
        number = int(unit[0].split(".")[2])
        tokens = (chosen == number).any(1).nonzero().flatten()
        x, y = mine[tokens], its[tokens]
        if is_down(unit):
            x, y = experts.expert(number).inner(x), other.expert(number).inner(y)
        found = moments[unit]
        assert found.tokens == len(tokens)
        torch.testing.assert_close(found.hessian, x.T @ x, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.drift, (y - x).T @ x, rtol=1e-5, atol=1e-4)
    assert common[False].tokens == 17
    torch.testing.assert_close(common[False].hessian, mine.T @ mine, rtol=1e-5, atol=1e-4)
    inner = sum(found.hessian for unit, found in moments.items() if is_down(unit))
    assert common[True].tokens == 34
    torch.testing.assert_close(common[True].hessian, inner, rtol=1e-5, atol=1e-4)


def test_shrinkage_is_between_both():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 8, generator=generator), torch.randn(50, 8, generator=generator)
    own, common = InputMoments(x.T @ x, (x - 1).T @ x, 3), InputMoments(y.T @ y, (y - 1).T @ y, 50)
    found = shrunk(own, common, 3 / 8)
    assert found.tokens == 3
    torch.testing.assert_close(found.mean_hessian(), 3 / 8 * x.T @ x / 3 + 5 / 8 * y.T @ y / 50)
    torch.testing.assert_close(found.mean_drift(), 3 / 8 * (x - 1).T @ x / 3 + 5 / 8 * (y - 1).T @ y / 50)
    assert torch.linalg.matrix_rank(found.hessian) == 8
    nothing = shrunk(InputMoments.empty(8, CPU, True), common, 0.0)
    torch.testing.assert_close(nothing.mean_hessian(), common.mean_hessian())


@pytest.mark.usefixtures("given_tables")
def test_an_expert_that_nothing_is_sent_to(ok, tmp_path):
    """Its router row is so low that no token chooses it: fitted with the moments of all tokens, trained by none, exported."""
    folder = save_toy(tmp_path / "model", "gpt-oss")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("router.bias"):
            tensors[name][2] = -1e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    distill = {"epochs": 1, "batch_size": 1, "lr_weights": 0.004}
    recipe = write_recipe(tmp_path / "r.json", folder, tmp_path / "run", distill=distill)
    log = ok("ptq", "--recipe", recipe).stderr
    assert "experts short of tokens" in log
    for record in events(tmp_path / "run" / "ptq"):
        assert record["starved"]["mlp.experts.2"] == 0
        linear = record["linears"]["mlp.experts.2.up_proj"]
        assert (linear["tokens"], linear["own"]) == (0, 0.0)
        assert linear["error"] < 0.3
    more = "data.training.sequences=48"  # enough for training to pay
    ok("distill", "--recipe", recipe, more)
    trained = next(record["block"] for record in events(tmp_path / "run" / "distill") if record["best_epoch"])
    file, prefix = f"block_{trained:03d}.safetensors", f"model.layers.{trained}.mlp.experts"
    before, after = (load_file(tmp_path / "run" / stage / file) for stage in ("ptq", "distill"))
    moved = [not torch.equal(before[name], after[name]) for name in (f"{prefix}.{e}.down_proj.levels" for e in range(4))]
    assert moved == [True, True, False, True]
    ok("act-calib", "--recipe", recipe, more)
    found = json.loads(ok("eval", "--recipe", recipe, "--json").stdout)
    assert 0 < found["ptq"]["routing"]["novels"] <= 1
    ok("export", "--recipe", recipe)


def test_results_do_not_depend_on_how_many_experts_are_held(ok, tmp_path, monkeypatch):
    folder = save_toy(tmp_path / "model", "qwen3-moe")
    for run, count in (("all", 5), ("one", 1)):
        monkeypatch.setattr("lbllm_cli.ptq.fit.experts_at_once", lambda *_, count=count: count)
        ok("ptq", "--recipe", write_recipe(tmp_path / f"{run}.json", folder, tmp_path / run))
    for index in range(3):
        name = f"ptq/block_{index:03d}.safetensors"
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
