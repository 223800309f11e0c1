"""Linears in training whose rows have one scale: levels of 2 bits."""

import pytest
import torch

from lbllm_cli.format.level_table import unpack_places
from lbllm_cli.format.weights import PackedWeight, grouped, pack_codes
from lbllm_cli.training.fixed import Fixed
from lbllm_cli.training.master import BITMAP, LEVELS, SCALES, WEIGHTS
from lbllm_cli.training.weights import PARAMETRISATIONS

SHAPES = [(5, 64, 16), (7, 72, 32)]
KINDS = {"nearest": {WEIGHTS, LEVELS}, "bitmap": {WEIGHTS, LEVELS, BITMAP}}


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _case(out, inn, size, seed=0):
    """Source weight, and any codes and levels."""
    g, groups = _generator(seed), -(-inn // size)
    codes = torch.randint(0, 4, (out, inn), generator=g, dtype=torch.uint8)
    levels = unpack_places(torch.randint(0, 256, (out, groups, 1), generator=g, dtype=torch.uint8))
    scale = (torch.rand(out, 1, generator=g) * 0.01 + 0.01).half()
    return torch.randn(out, inn, generator=g), PackedWeight(pack_codes(codes, size), levels, scale.expand(out, groups), inn, 2)


def _same(found, wanted):
    return all(torch.equal(now, before) for now, before in zip(found.stored, wanted.stored, strict=True))


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_start_is_the_packed_weight(name, out, inn, size):
    weight, packed = _case(out, inn, size)
    for train in (KINDS[name], {LEVELS}, {WEIGHTS}):
        linear = PARAMETRISATIONS[name](weight, packed, train, 0.1)
        assert torch.equal(linear(), packed.values())
        assert _same(linear.packed(), packed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_packed_is_the_forward_pass(name, out, inn, size, seed):
    weight, packed = _case(out, inn, size, seed)
    linear = PARAMETRISATIONS[name](weight, packed, KINDS[name], 0.1)
    linear()
    with torch.no_grad():
        for parameters in linear.kinds().values():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=_generator(seed)), alpha=0.5)
    linear.constrain(0.1)
    now = linear.packed()
    assert torch.equal(now.values(), linear())
    assert not torch.equal(now.levels, packed.levels)
    assert torch.equal(now.row_scale, packed.row_scale)
    assert now.stored[1].shape == (out, -(-inn // size), 1)


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_scales_alone_move_whole_rows(out, inn, size):
    weight, packed = _case(out, inn, size)
    linear = Fixed(weight, packed, {SCALES})
    assert torch.equal(linear(), packed.values())
    assert _same(linear.packed(), packed)
    ((factor,),) = linear.kinds().values()
    assert factor.shape == (out, 1, 1)
    upstream = torch.randn(out, inn, generator=_generator(1))
    linear().backward(upstream)
    # Measured: 1.2e-6.
    torch.testing.assert_close(factor.grad.flatten(), (upstream * packed.values()).sum(1), atol=1e-5, rtol=0)
    with torch.no_grad():
        factor.mul_(torch.linspace(0.7, 1.4, out).view(-1, 1, 1))
    now = linear.packed()
    assert torch.equal(now.codes, packed.codes)
    assert torch.equal(now.levels, packed.levels)
    assert torch.equal(now.row_scale.flatten(), (packed.row_scale.float().flatten() * torch.linspace(0.7, 1.4, out)).half())
    assert torch.equal(now.values(), linear())


def test_levels_of_fixed_codes_stay_with_their_code():
    weight, packed = _case(5, 64, 16)
    linear = Fixed(weight, packed, {LEVELS})
    upstream = torch.randn(5, 64, generator=_generator(2))
    linear().backward(upstream)
    codes, by_group = grouped(packed.unpacked(), 16), grouped(upstream, 16)
    wanted = torch.stack([(by_group * (codes == code)).sum(2) for code in range(4)], 2)
    torch.testing.assert_close(linear.levels.grad, wanted, atol=1e-5, rtol=0)
    with torch.no_grad():
        linear.levels.add_(torch.randn(linear.levels.shape, generator=_generator(3)))
    now = linear.packed()
    assert torch.equal(now.values(), linear())
    assert torch.equal(now.codes, packed.codes)
    # Inner levels lie between the outer ones, wherever training took them.
    assert bool((now.levels[..., [2, 0, 1, 3]].short().diff(dim=-1) > 0).all())


def test_a_scale_is_never_negative():
    """Where a row's best factor is below 0 training stops there: -0 and less are in no checkpoint."""
    weight, packed = _case(5, 64, 16)
    linear = Fixed(weight, packed, {SCALES})
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.3, weight_decay=0.0)
    for _ in range(20):
        (linear() + packed.values()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        linear.constrain(0)
    now = linear.packed()
    assert torch.equal(now.row_scale, torch.zeros(5, 1, dtype=torch.float16))
    assert not bool(now.row_scale.signbit().any())
    assert torch.equal(now.values(), linear())
    for _ in range(20):  # and it comes back
        (linear() - packed.values()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        linear.constrain(0)
    assert bool((linear.packed().row_scale > 0).all())
