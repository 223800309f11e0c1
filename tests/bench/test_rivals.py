"""scripts/bench/rivals: bits add up, blocks straddle rows and come back, EfficientQAT's quantizer is the paper's.

What the rivals' own libraries compute is theirs to test.
"""

import dataclasses
import json
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import ROOT, save_toy, write_recipe
from safetensors.torch import load_file
from torch.nn.functional import mse_loss
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from lbllm_cli.core.errors import UsageError
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.models.model import open_model
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.schema import Model

# Its modules import each other by name, as scripts in one folder do.
FOLDER = ROOT / "scripts" / "bench" / "rivals"
sys.path.insert(0, str(FOLDER))
try:
    modules = {path.stem: import_module(path.stem) for path in sorted(FOLDER.glob("*.py"))}
finally:
    sys.path.pop(0)
e2e_qp, efficientqat, ggml, ground, measure, plot, run, uniform = map(
    modules.get, ("e2e_qp", "efficientqat", "ggml", "ground", "measure", "plot", "run", "uniform")
)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (uniform.uniform_bits(64), 2 + 18 / 64),
        (uniform.uniform_bits(32), 2.5625),
        (uniform.uniform_bits(64, zero_bits=0), 2.25),
        (ggml.RIVALS["Q2_K"].bits, 2.625),
        (ggml.RIVALS["IQ2_XXS"].bits, 2.0625),
        (ggml.RIVALS["IQ3_XXS"].bits, 3.0625),
    ],
)
def test_bits(bits, expected):
    assert bits == expected


def test_every_rival_has_a_file_of_its_own(tmp_path):
    names = [run.BASE, *(name for names in run.RIVALS.values() for name in names)]
    assert len({run.file_of(tmp_path, name, ".json") for name in names}) == len(names)
    for name in run.RIVALS:
        assert list(modules[name].RIVALS) == run.RIVALS[name]


@pytest.mark.parametrize(("rows", "width", "joined"), [(8, 576, 4), (3, 512, 1), (4, 192, 4), (2, 128, 2)])
def test_blocks_straddle_rows_and_come_back(rows, width, joined):
    weight, importance = torch.randn(rows, width), torch.rand(width)
    seen = []

    def quantize(values, tiled):
        seen.append((values.shape, tiled))
        return np.floor(values)

    found = ggml.straddled(weight, importance, quantize)
    assert torch.equal(found, weight.floor())
    (shape, tiled) = seen[0]
    assert shape == (rows // joined, joined * width)
    assert shape[1] % ggml.BLOCK == 0
    # Every weight keeps its own channel's importance.
    assert np.array_equal(np.broadcast_to(tiled, shape).reshape(rows, width), importance.expand(rows, width).numpy())


def test_rows_that_fill_no_block_are_refused():
    with pytest.raises(ValueError, match="6 rows of 576 do not fill"):
        ggml.straddled(torch.zeros(6, 576), torch.ones(576), lambda values, _: values)


def slow_quantize(weight, scale, zero):
    """The paper's formula with autograd's own straight-through rounding."""

    def rounded(value):
        return value + (value.round() - value).detach()

    whole = rounded(zero)
    codes = (rounded(weight / scale) + whole).clamp(0, 3)
    return (codes - whole) * scale


def test_the_quantizer_and_its_gradients_are_the_papers():
    torch.manual_seed(0)
    weight, wanted = torch.randn(6, 3, 8), torch.randn(6, 3, 8)
    # Narrow scales cut off many codes; zero points lie between whole numbers.
    scale, zero = 0.2 + torch.rand(6, 3, 1), 3 * torch.rand(6, 3, 1)
    sides = []
    for function in (efficientqat.FakeQuantize.apply, slow_quantize):
        leaves = [tensor.clone().requires_grad_() for tensor in (weight, scale, zero)]
        values = function(*leaves)
        mse_loss(values, wanted).backward()
        sides.append([values.detach(), *(leaf.grad for leaf in leaves)])
    for fast, slow in zip(*sides, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-7)
    assert all(gradient.abs().sum() > 0 for gradient in sides[0][1:])


def test_weights_on_a_grid_come_back_and_others_are_refused():
    torch.manual_seed(0)
    codes = torch.randint(0, 4, (5, 2, 4))
    scale, zero = (torch.rand(5, 2) + 0.5).half().float(), torch.randint(0, 4, (5, 2))
    weight = ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).view(5, 8)
    found = uniform.on_grid(weight, scale, zero)
    assert torch.equal(found.codes, codes.to(torch.uint8))
    assert torch.equal(found.values(), weight)
    with pytest.raises(ValueError, match="steps off"):
        uniform.on_grid(weight + 0.3 * scale.repeat_interleave(4, 1), scale, zero)


def test_fronts():
    assert plot.front([(4.0, 2.0), (2.0, 4.0), (3.0, 1.0), (2.0, 3.0), (3.0, 1.0)]) == [(2.0, 3.0), (3.0, 1.0)]
    assert plot.front([]) == []


def test_ours_is_measured_on_the_same_text(tmp_path):
    (tmp_path / "eval").mkdir()
    entry = {"perplexity": {"novels": 12.0}, "kl": {"novels": 0.1}, "bits_per_weight": 2.5}
    results = {"base": {"perplexity": {"novels": 8.0}}, "ptq": entry}
    (tmp_path / "eval" / "results.json").write_text(json.dumps(results))
    label, row = plot.own(f"lbllm={tmp_path}:ptq", results["base"])
    found = plot.point(label, row, results["base"])
    assert (found.label, found.bits, found.perplexity, found.ours) == ("lbllm", 2.5, {"novels": 1.5}, True)
    with pytest.raises(ValueError, match="novels"):
        plot.own(f"lbllm={tmp_path}:ptq", {"perplexity": {"novels": 9.0}})
    with pytest.raises(ValueError, match="distill is not measured"):
        plot.own(f"lbllm={tmp_path}:distill", results["base"])
    with pytest.raises(ValueError, match="expected LABEL"):
        plot.own("lbllm", results["base"])


def test_rows_of_earlier_runs_are_drawn_beside_new_ones(tmp_path, monkeypatch):
    """A row of the same name is replaced, and what is drawn is left as a file to draw from."""

    def row(novels, **more):
        return {"bits_per_weight": 2.5, "perplexity": {"novels": novels}, "kl": {"novels": novels / 10}} | more

    points, out = tmp_path / "points.json", tmp_path / "out"
    points.write_text(json.dumps({run.BASE: row(2.0), "Q2_K": row(4.0), "lbllm": row(3.0, ours=True)}))
    (out / "eval").mkdir(parents=True)
    run.file_of(out, "AutoRound", ".json").write_text(json.dumps(row(5.0)))
    (out / "eval" / "results.json").write_text(json.dumps({"base": row(2.0), "ptq": row(2.5, bytes=7)}))
    monkeypatch.setattr(sys, "argv", ["plot.py", "--out", str(out), "--points", str(points), "--ours", f"lbllm={out}:ptq"])
    plot.main()
    drawn = json.loads((out / "pareto.json").read_text())
    assert drawn == {run.BASE: row(2.0), "Q2_K": row(4.0), "lbllm": row(2.5, ours=True), "AutoRound": row(5.0)}
    assert all(name in (out / "pareto.svg").read_text() for name in drawn if name != run.BASE)
    monkeypatch.setattr(sys, "argv", ["plot.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--points"):
        plot.main()


def test_the_picture_shows_the_table():
    """docs/pareto.json, which docs/pareto.svg is drawn from, and the rows of docs/measurements.md."""
    lines = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8").splitlines()
    rows = json.loads((ROOT / "docs" / "pareto.json").read_text(encoding="utf-8"))
    del rows[run.BASE]
    picture = (ROOT / "docs" / "pareto.svg").read_text(encoding="utf-8")
    for name, row in rows.items():
        cells = [f"| {row['bits_per_weight']:.3f} |", *(f"| {found:.2f} (" for found in row["perplexity"].values())]
        cells += ["| {:.3f}, {:.3f}, {:.3f} |".format(*row["kl"].values())]
        assert any(all(cell in line for cell in cells) for line in lines), (name, cells)
        assert f"<!-- {name} -->" in picture


@pytest.fixture
def toy(tmp_path, little_text, given_tables):
    path = write_recipe(tmp_path / "r.yaml", save_toy(tmp_path / "model"), tmp_path / "run")
    recipe = load_recipe(path, ["model.dtype=float32"])
    (tmp_path / "out").mkdir()
    return ground.open_ground(recipe, tmp_path / "out")


def test_rows_are_measured_once_and_written(toy, monkeypatch):
    made = []

    def make(given):
        made.append(given)
        names = given.model.binarized_names
        return ground.Made({name: given.model.read([name])[name].float() for name in names}, "the base model itself")

    run.base_row(toy, tasks=False)
    row = run.make_row(toy, "Q2_K", ground.Rival(16.0, "16", make), keep=False, tasks=False)
    base = json.loads((toy.out / "full-precision.json").read_text())
    assert row["perplexity"] == base["perplexity"]
    assert all(abs(value) < 1e-6 for value in row["kl"].values())
    assert set(row["top1"].values()) == {1.0}
    assert len(made) == 1
    assert not list(toy.out.glob("*.model"))
    run.write_table(toy.out)
    assert "(1.00x)" in (toy.out / "table.md").read_text()
    # A logarithm has no place for the KL of a model to itself.
    row |= {"kl": dict.fromkeys(row["kl"], 0.5)}
    plot.draw([plot.point("a row", row, base)], list(base["perplexity"]), toy.out / "pareto.svg")
    assert "a row" in (toy.out / "pareto.svg").read_text()


def test_a_rival_is_measured_as_eval_measures_a_checkpoint(toy, ok, tmp_path):
    """The weights of a `ptq` stage, as those of a rival: perplexity, divergence in its direction, likeliest tokens."""
    recipe = tmp_path / "r.yaml"
    ok("ptq", "--recipe", recipe, "model.dtype=float32", "ptq.rounds=0")
    ok("eval", "--recipe", recipe, "model.dtype=float32")
    expected = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())["ptq"]
    checkpoint, weights = Checkpoint(tmp_path / "run", "ptq"), {}
    for index in range(toy.model.blocks):
        stored = checkpoint.read_block(index)
        for name in (name for name in toy.model.binarized_names if name.startswith(f"model.layers.{index}.")):
            packed = PackedWeight.from_tensors(stored, name.removesuffix(".weight"), toy.model.shapes[name][1])
            weights[name] = packed.values()
    ground.write_folder(toy.model, weights, toy.out / "rival")
    found = measure.measure(toy, open_model(Model(path=str(toy.out / "rival"), dtype="float32"), torch.device("cpu")))
    for kind in ("perplexity", "kl", "top1"):
        assert found[kind] == pytest.approx(expected[kind], rel=1e-4, abs=1e-5), kind  # measured 0
    assert all(value > 0.01 for value in found["kl"].values())


def test_the_importance_of_a_channel_is_its_mean_square(toy):
    found = ggml.importance_matrix(toy)
    embedded = toy.model.embed()(toy.calibration)
    layer = toy.model.block(0).layer
    expected = layer.input_layernorm(embedded).double().square().mean((0, 1)).float()
    for name in ("q_proj", "k_proj", "v_proj"):
        torch.testing.assert_close(found[f"model.layers.0.self_attn.{name}.weight"], expected, rtol=1e-5, atol=0)
    assert set(found) == set(toy.model.binarized_names)


def test_scales_trained_end_to_end_lower_the_loss(toy, monkeypatch):
    monkeypatch.setattr(e2e_qp, "RATE", 3e-3)
    model = AutoModelForCausalLM.from_pretrained(toy.model.folder, dtype=torch.float32).requires_grad_(False)
    scaled = {}
    for name in toy.model.binarized_names:
        weight = toy.model.read([name])[name].float()
        grouped = weight.view(len(weight), -1, 16)
        scale = grouped.abs().amax(-1, keepdim=True).half()
        steps = (grouped / scale.float()).round() + 1
        codes = uniform.Codes(steps.to(torch.uint8), scale, torch.ones_like(scale, dtype=torch.uint8))
        scaled[name] = e2e_qp.Scaled(codes)
        parametrize.register_parametrization(model.get_submodule(name.removesuffix(".weight")), "weight", scaled[name])
    before = {name: one.scale.detach().clone() for name, one in scaled.items()}
    first, last = e2e_qp.train(model, scaled, toy.training[:16].repeat(8, 1), seed=0)
    assert last < first
    assert all(not torch.equal(before[name], one.scale) for name, one in scaled.items())


def test_tasks_are_scored_on_a_rivals_folder(toy, ok, tmp_path):
    """As `lbllm eval` scores the checkpoint it is a copy of: here the base model itself."""
    weights = {name: toy.model.read([name])[name].float() for name in toy.model.binarized_names}
    ground.write_folder(toy.model, weights, toy.out / "same")
    recipe = toy.plan.recipe
    few = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"limit": 6})})
    found = measure.task_scores(dataclasses.replace(toy, plan=dataclasses.replace(toy.plan, recipe=few)), toy.out / "same")
    ok("eval", "--recipe", tmp_path / "r.yaml", "model.dtype=float32", "eval.limit=6", f"eval.tasks={json.dumps(measure.TASKS)}")
    expected = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())["base"]["tasks"]
    assert {task: scores["acc"] for task, scores in found.items()} == {task: scores["acc"] for task, scores in expected.items()}
    assert len(found) == 2


def test_folders_hold_all_linears_or_are_refused(toy):
    weights = {name: torch.zeros(toy.model.shapes[name]) for name in toy.model.binarized_names}
    ground.write_folder(toy.model, weights, toy.out / "zeros")
    found = load_file(toy.out / "zeros" / "model.safetensors")
    assert set(found) == set(toy.model.shapes)
    assert all(not found[name].any() for name in weights)
    first, *rest = weights
    with pytest.raises(ValueError, match="missing or left over"):
        ground.write_folder(toy.model, {name: weights[name] for name in rest}, toy.out / "other")
    with pytest.raises(ValueError, match="got"):
        ground.write_folder(toy.model, {**weights, first: torch.zeros(1, 1)}, toy.out / "other")


def test_block_ap_brings_a_block_nearer_and_stores_what_it_trained(toy):
    block = toy.model.block(0)
    torch.manual_seed(0)
    inputs = torch.randn(8, 16, toy.model.config.hidden_size)
    targets = block(inputs)
    quantizers = efficientqat.attach(block, 16)
    first, last = efficientqat.train(block, quantizers, inputs, targets, rates=30, seed=0)
    assert last < first
    trained = block(inputs)
    codes = efficientqat.detach(block, quantizers)
    assert set(codes) == {name for name in toy.model.binarized_names if name.startswith(block.prefix)}
    # Scales are rounded to 16 bits on the way.
    torch.testing.assert_close(block(inputs), trained, rtol=0.02, atol=0.02)
    path = toy.out / "codes.safetensors"
    uniform.write_codes(path, codes)
    back = uniform.read_codes(path)
    assert all(torch.equal(back[name].values(), codes[name].values()) for name in codes)
    name = next(iter(codes))
    assert torch.equal(e2e_qp.Scaled(codes[name])(torch.zeros(toy.model.shapes[name])), codes[name].values())


def test_a_stopped_block_ap_goes_on_where_it_was(toy, monkeypatch):
    monkeypatch.setattr(efficientqat, "EPOCHS", 1)
    monkeypatch.setattr(efficientqat.attach, "__defaults__", (16,))
    few = dataclasses.replace(toy, training=toy.training[:4])
    whole = efficientqat.block_ap(few, 16)
    last = toy.model.block_names(toy.model.blocks - 1)
    uniform.write_codes(toy.out / "block_ap-16.safetensors", {name: codes for name, codes in whole.items() if name not in last})
    trained = []
    train = efficientqat.train
    monkeypatch.setattr(efficientqat, "train", lambda *arguments: trained.append(0) or train(*arguments))
    again = efficientqat.block_ap(few, 16)
    assert len(trained) == 1
    assert set(again) == set(whole) == set(toy.model.binarized_names)
    assert all(torch.equal(again[name].values(), whole[name].values()) for name in whole)


def test_an_unknown_rival_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run.py", "--recipe", "r.yaml", "--out", str(tmp_path), "--only", "Q9"])
    with pytest.raises(SystemExit):
        run.main()
    assert "no such rival: Q9" in capsys.readouterr().err


def test_a_mistaken_recipe_is_the_projects_refusal(tmp_path):
    arguments = run.argparse.Namespace(recipe=tmp_path / "none.yaml", out=tmp_path, overrides=[], segments=None)
    with pytest.raises(UsageError, match="does not exist"):
        run.resolved(arguments)
