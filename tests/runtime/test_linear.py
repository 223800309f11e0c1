"""The packed linear against torch's linear with the decoded weight."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.runtime.linear import PackedLinear

SHAPES = [(576, 5, 128), (100, 7, 48), (16, 3, 16)]


def _layer(inn, out, size, bias, seed=0):
    """A packed linear with random contents."""
    g = torch.Generator().manual_seed(seed)
    layer = PackedLinear(inn, out, size, bias)
    layer.weight.copy_(torch.randint(0, 256, layer.weight.shape, generator=g))
    layer.levels.copy_(torch.randint(-127, 128, layer.levels.shape, generator=g))
    # Scales that bfloat16 cannot hold, subnormal ones among them.
    layer.scale.copy_(torch.rand(layer.scale.shape, generator=g) * 0.02 + 1e-3)
    layer.scale[0] = 3 * 2.0**-24
    if bias:
        layer.bias.data.copy_(torch.randn(out, generator=g))
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inn", "out", "size"), SHAPES)
def test_forward_is_the_decoded_linear(inn, out, size, bias):
    layer = _layer(inn, out, size, bias)
    inputs = torch.randn(2, 3, inn, generator=torch.Generator().manual_seed(1))
    weight = PackedWeight(layer.weight, layer.levels, layer.scale, inn).values()
    assert torch.equal(layer.dense_weight(), weight)
    wanted = linear(inputs, weight, layer.bias)
    torch.testing.assert_close(layer(inputs), wanted, atol=0, rtol=0)
    assert layer(inputs).shape == (2, 3, out)
    if bias:
        # Bias does something: without it the result differs by exactly that.
        assert not torch.equal(wanted, linear(inputs, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_forward_in_the_inputs_dtype(dtype):
    layer = _layer(100, 7, 48, bias=True).to(dtype)
    inputs = torch.randn(4, 100, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = layer(inputs)
    assert found.dtype == dtype
    torch.testing.assert_close(found, linear(inputs, layer.dense_weight().to(dtype), layer.bias), atol=0, rtol=0)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float32),
        lambda m: m.bfloat16().float(),
    ],
)
def test_casts_keep_the_packed_tensors(cast):
    layer = _layer(100, 7, 48, bias=True)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    model = cast(nn.Sequential(nn.Linear(3, 3), layer))
    now = model[1].state_dict()
    for name in ("weight", "levels", "scale"):
        assert now[name].dtype == kept[name].dtype
        assert torch.equal(now[name], kept[name])
    # The rest of the model, the bias included, is cast.
    assert model[1].bias.dtype == model[0].weight.dtype


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict(bias):
    layer = _layer(576, 5, 128, bias)
    state = layer.state_dict()
    wanted = {
        "weight": (torch.uint8, (5, 5, 32)),
        "levels": (torch.int8, (5, 5, 4)),
        "scale": (torch.float16, (5, 5)),
    } | ({"bias": (torch.float32, (5,))} if bias else {})
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == wanted
    other = PackedLinear(576, 5, 128, bias)
    other.load_state_dict(state)
    inputs = torch.randn(2, 576, generator=torch.Generator().manual_seed(3))
    assert torch.equal(other(inputs), layer(inputs))


def test_dense_weight_is_refused():
    # Three axes: a weight of [out, in] does not load, and the packed one fits no dense linear.
    layer = _layer(16, 3, 16, bias=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({**layer.state_dict(), "weight": torch.zeros(3, 16, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.Linear(16, 3, bias=False).load_state_dict({"weight": layer.weight})


def test_bias_is_not_trained():
    assert [name for name, value in _layer(16, 3, 16, bias=True).named_parameters() if value.requires_grad] == []


def test_moves_to_a_device_without_data():
    layer = _layer(16, 3, 16, bias=True).to("meta", torch.bfloat16)
    assert layer.scale.dtype == torch.float16
    assert {value.device.type for value in layer.state_dict().values()} == {"meta"}
