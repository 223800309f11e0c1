"""What a stage expects to write, in bits."""

import math

import pytest
import torch

from lbllm_cli.format.weights import PackedWeight, expected_bits, pack_codes

SHAPES = [(3, 576, 128), (2, 100, 48), (5, 16, 16), (1, 1, 16), (4, 33, 16), (2, 128, 128)]


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _packed(out, inn, size, seed=0):
    """Random codes, levels and scale of a linear."""
    g = _generator(seed)
    groups = math.ceil(inn / size)
    codes = torch.randint(0, 4, (out, inn), generator=g, dtype=torch.uint8)
    levels = torch.randint(-127, 128, (out, groups, 4), generator=g).to(torch.int8)
    return codes, levels, (torch.rand(out, groups, generator=g) * 0.02).half()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("out", "inn", "size"), [*SHAPES, (1, 4096, 128)])
def test_expected_bits_are_the_bytes(out, inn, size, bits):
    codes, levels, scale = _packed(out, inn, size)
    stored = PackedWeight(pack_codes(codes, size), levels, scale, inn, bits).to_tensors("p")
    held = sum(t.numel() * t.element_size() for t in stored.values())
    assert expected_bits([(out, inn)], size, bits) * out * inn == pytest.approx(8 * held, rel=1e-12)


def test_expected_bits_by_hand():
    assert expected_bits([(4096, 4096)], 128) == 2.375
    assert expected_bits([(4096, 4096)], 64, 4) == 2.5
    # 576 inputs are 5 groups of 128: 640 codes and 5 x 48 bits for 576 weights.
    assert expected_bits([(7, 576)], 128) == pytest.approx((640 * 2 + 5 * 48) / 576)
    # Two linears: weighted by their sizes.
    assert expected_bits([(1, 128), (3, 64)], 128) == pytest.approx((304 + 3 * 304) / (128 + 3 * 64))
