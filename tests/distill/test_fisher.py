"""What the model's predictions hang on: against autograd over the whole model, and that a run with it is resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file
from stages import promised, run_in_pieces
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from lbllm_cli.distill import information
from lbllm_cli.distill.fisher import metric_factor, prediction_slopes
from lbllm_cli.models import head as heads
from lbllm_cli.models.head import Head
from lbllm_cli.pipeline.metrics import OutputMetric, massive_tokens
from lbllm_cli.recipe.load import load_recipe


@pytest.fixture
def recipe(finished, tmp_path) -> Path:
    """A recipe whose output folder holds the finished ptq stage."""
    toy, output = finished("ptq")
    shutil.copytree(output / "ptq", tmp_path / "run" / "ptq")
    distill = {"epochs": 1, "fisher": 0.8, "fisher_sequences": 3, "batch_size": 3, "micro_batch_size": 2}
    return write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run", distill=distill)


@pytest.mark.parametrize(("divisor", "cap"), [(1.0, None), (2.0, None), (1.0, 3.0)])
def test_slopes_are_those_of_the_drawn_tokens(monkeypatch, divisor, cap):
    monkeypatch.setattr(heads, "LOGITS", 3 * 50)
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(50, 8, generator=generator), divisor, cap)
    states, chance = torch.randn(10, 8, generator=generator), torch.rand(10, generator=generator)
    found = prediction_slopes(states, head, chance)
    free = states.double().requires_grad_()
    products = linear(free, head.weight.double()) / divisor
    logits = products if cap is None else cap * (products / cap).tanh()
    likelihood = logits.log_softmax(-1)
    for row, wanted in enumerate(chance.tolist()):
        total, token = 0.0, -1
        while total <= wanted:
            token += 1
            total += float(likelihood[row, token].detach().exp())
        likelihood[row, token].backward(retain_graph=True)
    assert free.grad is not None
    torch.testing.assert_close(found.double(), free.grad, rtol=1e-5, atol=1e-5)


def test_factor_counts_information_and_channels():
    generator = torch.Generator().manual_seed(1)
    some, scale = torch.randn(6, 4, generator=generator), torch.tensor([1.0, 0.5, 1.0, 0.25])
    matrix, off = some.T @ some, torch.randn(5, 4, generator=generator)
    for channels in (None, scale):
        metric = OutputMetric(channels, metric_factor(matrix, 0.8, channels))
        by_channels = off.square() if channels is None else (off * channels).square()
        usual = float(matrix.diagonal().mean())
        wanted = 0.8 * torch.einsum("ni,ij,nj->n", off, matrix, off) / usual + 0.2 * by_channels.sum(-1)
        torch.testing.assert_close(metric.error(off, torch.zeros_like(off)), wanted, rtol=1e-5, atol=1e-6)
    found = metric_factor(torch.diag(torch.tensor([3.0, 1.0])), 0.5, None)
    assert torch.allclose(found, torch.tensor([1.25, 0.75]).sqrt().diag())
    assert torch.equal(metric_factor(torch.zeros(2, 2), 0.5, None), torch.eye(2))


def test_information_is_that_of_gradients_through_the_whole_model(ok, recipe, tmp_path, monkeypatch):
    kept: dict[str, torch.Tensor] = {}

    def keep(self: information.Information) -> None:
        kept["tokens"] = self.tokens
        shutil.copytree(self.folder, tmp_path / "kept")

    monkeypatch.setattr(information.Information, "remove", keep)
    ok("distill", "--recipe", recipe)
    files = sorted((tmp_path / "kept").iterdir())
    assert [file.name for file in files] == [f"block_{index:03d}.safetensors" for index in range(3)]
    model = AutoModelForCausalLM.from_pretrained(load_recipe(recipe).model.path, dtype=torch.float64)
    outputs: list[torch.Tensor] = []

    def see(_: object, __: object, out: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        states = out[0] if isinstance(out, tuple) else out
        states.retain_grad()
        outputs.append(states)

    for layer in model.model.layers:
        layer.register_forward_hook(see)
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(kept["tokens"].shape, generator=generator)
    likelihood = model(kept["tokens"]).logits.log_softmax(-1)
    passed = likelihood.exp().cumsum(-1)
    drawn = torch.searchsorted(passed, chance.double().unsqueeze(-1), right=True).clamp(max=passed.shape[-1] - 1)
    likelihood.gather(-1, drawn).sum().backward()
    for states, file in zip(outputs, files, strict=True):
        ordinary = torch.stack([~massive_tokens(row.unsqueeze(0))[0] for row in states.detach()])
        assert states.grad is not None
        slopes = states.grad[ordinary]
        found = load_file(file)["information"].double()
        torch.testing.assert_close(found, slopes.T @ slopes, rtol=1e-3, atol=1e-4 * float((slopes.T @ slopes).diagonal().mean()))


def test_forecast_counts_matrices_and_what_enters_each_block(ok, recipe):
    def need(*keys: str) -> dict[str, float]:
        found = json.loads(ok("validate", "--recipe", recipe, "--json", *keys).stdout)
        wanted: dict[str, float] = found["forecast_bytes"]["distill"]
        return wanted

    least, with_matrices = need("distill.fisher=0"), need()
    hidden = AutoConfig.from_pretrained(load_recipe(recipe).model.path).hidden_size
    assert with_matrices["disk"] - least["disk"] == 3 * 4 * hidden**2
    # Streams are two of nine sequences; what enters and leaves three blocks, and slopes, are five of three, or of nine.
    assert need("distill.fisher_sequences=9")["ram"] - with_matrices["ram"] == (5 * 9 - 2 * 9) * 32 * hidden * 4


def test_a_run_is_resumed_from_any_step(ok, lbllm, recipe, tmp_path, monkeypatch):
    command, folder = ("distill", "--recipe", recipe), tmp_path / "run" / "distill"
    ok(*command)
    expected = promised(folder)
    assert not (folder / "information").exists()
    for key, same in (("runtime.streams=disk", True), ("distill.fisher=0", False)):
        shutil.rmtree(folder)
        ok(*command, key)
        assert (promised(folder) == expected) is same
    shutil.rmtree(folder)
    assert run_in_pieces(lbllm, monkeypatch, folder, *command) >= 3  # 3 blocks x 3 steps
    assert promised(folder) == expected
