"""Units of packed linears: what they give, what they give back, and when they leave a call to torch."""

import copy

import pytest
import torch
from packed_weights import random_weights

from lbllm_cli.format.activations import Tables, uniform_levels
from lbllm_cli.format.weights import PARTS
from lbllm_cli.runtime.attachments import _MET
from lbllm_cli.runtime.cuda import gemv
from lbllm_cli.runtime.cuda.unit import CudaUnit, usable
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.runtime.shared_input import SharedInput
from lbllm_cli.training.knees import Shape, tables_of

KNEE = tables_of([Shape(3, 4, 4, 4, 5, 6), Shape(5, 6, 2, 2, 3, 3)])


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """As many rows of weights to a program as of a large model's linears: interpreted, a program costs more than its rows."""
    monkeypatch.setattr(gemv, "_PROGRAMS", 1)


def linears(device, inn=72, outs=(3, 2), size=32, biases=(False, False), bits=8) -> list[PackedLinear]:
    made = []
    for out, bias, packed in zip(outs, biases, random_weights(inn, outs, size, bits=bits), strict=True):
        layer = PackedLinear(inn, out, size, bias, bits)
        for part, tensor in zip(PARTS, packed.stored, strict=True):
            getattr(layer, part).copy_(tensor)
        layer.scale[0] = 0.01
        if bias:
            layer.bias.data.copy_(torch.randn(out))
        made.append(layer.to(device))
    return made


def quantizer(device, tables=KNEE, size=32) -> ActQuantizer:
    return ActQuantizer(tables, size).to(device)


def both(layers, by, x):
    """Outputs of the linears without and with a unit."""
    before = [layer(x if by is None else by(x)) for layer in layers]
    unit = CudaUnit(layers, by)
    return unit, before, [layer(x) for layer in layers]


def close(found, wanted, dtype=torch.float32):
    # Of the largest output; measured 6e-7, 9e-4 and 7e-3: torch rounds weights and quantized inputs to 16 bits.
    rtol = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.abs().max()))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(
    ("tables", "size"),
    [
        (KNEE, 32),
        (KNEE, 72),
        (Tables(uniform_levels(4), None, torch.ones(1, 2)), 32),
        (Tables(uniform_levels(8), None, torch.ones(1, 2)), 32),
        (None, 0),
    ],
)
def test_a_unit_gives_what_its_linears_gave(device, tables, size, rows):
    x = torch.randn(rows, 72, generator=torch.Generator().manual_seed(rows)).to(device)
    by = None if tables is None else quantizer(device, tables, size)
    layers = linears(device, biases=(True, False))
    _, wanted, found = both(layers, by, x)
    close(found, wanted)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(("step", "fold"), [(16, 1), (32, 4), (64, 4), (72, 4)])
def test_a_unit_with_a_scale_for_each_row(device, step, fold, rows):
    x = torch.randn(rows, 72, generator=torch.Generator().manual_seed(rows)).to(device)
    layers = linears(device, size=16, bits=2, biases=(True, False))
    before = [layer.packed().stored for layer in layers]
    unit, wanted, found = both(layers, quantizer(device, KNEE, step), x)
    assert unit.weights.fold == fold
    close(found, wanted)
    for slot, stored in enumerate(before):
        assert all(torch.equal(a, b) for a, b in zip(unit.packed(slot).stored, stored, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_have_the_inputs_dtype(device, dtype):
    x = torch.randn(1, 2, 72).to(device, dtype)
    layers = [layer.to(dtype) for layer in linears(device, biases=(True, True))]
    _, wanted, found = both(layers, quantizer(device), x)
    close(found, wanted, dtype)


def test_weights_come_back_bit_for_bit(device):
    layers = linears(device, outs=(3, 2, 1), biases=(False,) * 3)
    before = [layer.packed() for layer in layers]
    CudaUnit(layers, None)
    for layer, packed in zip(layers, before, strict=True):
        assert layer.weight is None
        for found, wanted in zip(layer.packed().tensors, packed.tensors, strict=True):
            assert torch.equal(found, wanted)


def test_a_shared_input_is_multiplied_once(device, monkeypatch):
    layers = linears(device)
    unit, calls = CudaUnit(layers, quantizer(device)), []
    run = unit.run
    monkeypatch.setattr(unit, "run", lambda x: calls.append(x) or run(x))
    x = torch.randn(1, 72, device=device)
    shared = SharedInput.of(x)
    first = [layer(shared) for layer in layers]
    assert len(calls) == 1
    close([layers[0](shared)], first[:1])  # handed out once: this is another
    assert len(calls) == 2
    close([layer(x) for layer in layers], first)
    assert len(calls) == 4


def test_what_learns_is_left_to_torch(device):
    layers = linears(device)
    unit, x = CudaUnit(layers, None), torch.randn(2, 72, device=device, requires_grad=True)
    unit.output(1, x).sum().backward()
    close([x.grad[0]], [layers[1].dense_weight().sum(0)])


def test_doubles_and_traced_calls_are_left_to_torch(device, monkeypatch):
    layers, by = linears(device, biases=(True, False)), quantizer(device)
    unit, x = CudaUnit(layers, by), torch.randn(2, 72, device=device)
    wanted = layers[0](x)
    monkeypatch.setattr(unit, "run", None)
    close([unit.output(0, x.double()).float()], [wanted])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    close([unit.output(0, x)], [wanted])


def test_a_quantizer_is_met_and_may_be_switched_off_and_edited(device):
    layers, by = linears(device), quantizer(device)
    unit, x = CudaUnit(layers, by), torch.randn(1, 72, device=device)
    quantized = layers[0](x)
    assert by.__dict__[_MET]
    by.enabled = False
    full = layers[0](x)
    close([full], [x @ layers[0].dense_weight().T])
    assert not torch.allclose(full, quantized, rtol=1e-3)
    by.enabled = True
    assert torch.equal(layers[0](x), quantized)
    kept = unit.tables
    assert unit.tables is kept
    by.act_clip.fill_(30000)
    assert unit.tables is not kept
    close([layers[0](x)], [by(x) @ layers[0].dense_weight().T])
    kept = unit.tables
    by.act_levels = by.act_levels.clone()
    assert unit.tables is not kept


def test_a_bias_is_read_as_it_is_now(device):
    layers = linears(device, biases=(False, True))
    unit, x = CudaUnit(layers, None), torch.randn(1, 72, device=device)
    before = layers[1](x)
    assert unit.bias is unit.bias
    with torch.no_grad():
        layers[1].bias += 1
    close([layers[1](x)], [before + 1])


def test_no_rows_and_wrong_widths(device):
    (layer, _), by = linears(device), quantizer(device)
    unit = CudaUnit([layer], by)
    assert unit.output(0, torch.zeros(2, 0, 72, device=device)).shape == (2, 0, 3)
    assert by.__dict__[_MET]
    with pytest.raises(ValueError, match="width 72, got 70"):
        unit.output(0, torch.zeros(1, 70, device=device))


def test_a_width_that_is_no_multiple_of_four_and_a_view(device):
    layers = linears(device, inn=70)
    _, wanted, found = both(layers, None, torch.randn(2, 70, device=device).half())
    close(found, wanted, torch.float16)
    x = torch.randn(73, device=device).bfloat16()[1:].view(1, 72)
    _, wanted, found = both(linears(device), None, x)
    close(found, wanted, torch.bfloat16)


def test_a_copy_has_weights_and_quantizer_of_its_own(device):
    layers, by = linears(device), quantizer(device)
    CudaUnit(layers, by)
    x = torch.randn(1, 72, device=device)
    wanted, (twin, other) = layers[0](x), copy.deepcopy((layers[0], by))
    by.enabled = False
    assert torch.equal(twin(x), wanted)
    assert twin.unit is not layers[0].unit
    assert other is twin.unit.quantizer
    twin.bfloat16()
    assert torch.equal(twin.packed().scale, layers[0].packed().scale)


def test_results_are_added_to_a_residual(device):
    layers, by = linears(device, biases=(True, False)), quantizer(device)
    unit, x = CudaUnit(layers, by), torch.randn(2, 72, device=device)
    residual, out = torch.randn(2, 5, device=device), torch.empty(2, 5, device=device)
    places, step = unit.quantized(x, unit.tables)
    unit.linear_quantized(places, step, out, residual)
    close([out], [unit.run(x) + residual])
    by.enabled = False
    unit.linear_values(x, out, residual)
    close([out], [unit.run(x) + residual])


def test_where_a_unit_can_run(device):
    layers = linears(device)
    assert usable(layers, None)
    assert usable(layers, quantizer(device))
    assert not usable(layers, quantizer(device, size=16))
    assert usable(layers, quantizer(device, size=80))
    assert usable(linears(device, size=16), quantizer(device, size=48))
    assert not usable([layers[0], layers[1].to("meta")], None)
    unit = CudaUnit([layers[0]], None)
    assert unit.runs_on(unit.weights.words.device)
    assert not unit.runs_on(torch.device("meta"))


def test_nothing_is_launched_without_values():
    """A pass over tensors without values."""
    layers, by = [layer.to("meta") for layer in linears("cpu")], quantizer("cpu").to("meta")
    unit = CudaUnit(layers, by)
    for rows in (1, 9):
        assert unit.output(1, torch.empty(rows, 72, device="meta")).shape == (rows, 2)
