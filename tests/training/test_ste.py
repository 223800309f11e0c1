"""Straight-through estimators: forward passes against brute force, gradients against differences of the declared surrogates."""

import pytest
import torch

from lbllm_cli.format.levels import level_values, project_levels
from lbllm_cli.format.weights import codes_from_ranks, dequantize, ranks_from_codes
from lbllm_cli.training.ste import (
    BitmapLevel,
    NearestLevel,
    StoredLevels,
    bitmap_codes,
    bitmap_level,
    nearest_level,
    nearest_ranks,
    polarisation,
    polarisation_gradient,
    stored_levels,
    sums_per_level,
)

SHAPES = [(5, 4, 16), (7, 3, 32), (1, 1, 4)]


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _levels(out, groups, g):
    """float64 [out, groups, 4], ascending, on a grid of eighths."""
    return (torch.randint(-16, 17, (out, groups, 4), generator=g).double() / 8).sort(2).values


def _latents(out, groups, size, g):
    """float64 [out, groups, size] on sixteenths, where halfway between two levels is exact."""
    return torch.randint(-48, 49, (out, groups, size), generator=g).double() / 16


def _bitmap_case(out, groups, size, seed):
    """Latent, bitmap and levels in code order, float64."""
    g = _generator(seed)
    latent, bitmap = (torch.randn(out, groups, size, generator=g, dtype=torch.float64) for _ in range(2))
    levels = torch.randn(out, groups, 4, generator=g, dtype=torch.float64).sort(2).values
    return latent, (0.5 + 0.3 * bitmap).clamp(0, 1), levels[..., [1, 2, 0, 3]]


def _slow_codes(latent, bitmap, levels):
    """bitmap_codes, one weight at a time, of levels in code order."""
    codes = torch.zeros(latent.shape, dtype=torch.int64)
    for r, k, j in torch.cartesian_prod(*(torch.arange(n) for n in latent.shape)).tolist():
        middle = (float(levels[r, k, 0]) + float(levels[r, k, 1])) / 2
        codes[r, k, j] = 2 * (float(bitmap[r, k, j]) > 0.5) + (float(latent[r, k, j]) > middle)
    return codes


def _differences(function, at, upstream, step=1e-3):
    """Central differences of sum(upstream * function(x)) in every entry of x at `at`. float64."""
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        moved = []
        for sign in (1, -1):
            x = at.clone()
            x.view(-1)[i] += sign * step
            moved.append(float((upstream * function(x)).sum()))
        gradient.view(-1)[i] = (moved[0] - moved[1]) / (2 * step)
    return gradient


def _gradients(function, inputs, upstream):
    leaves = [x.clone().requires_grad_() for x in inputs]
    (function(*leaves) * upstream).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("out", "groups", "size"), SHAPES)
def test_nearest_ranks_against_brute_force(out, groups, size):
    g = _generator(0)
    latent, levels = _latents(out, groups, size, g), _levels(out, groups, g)
    levels = levels + torch.arange(4) / 8  # no two are equal
    distance = (latent.unsqueeze(3) - levels.unsqueeze(2)).abs()
    ranks = nearest_ranks(latent, levels)
    assert ranks.dtype == torch.uint8
    # Of equal distances argmin takes the first, the lower level's.
    assert torch.equal(ranks.long(), distance.argmin(3))
    if latent.numel() > 4:
        nearest = distance.sort(3).values
        assert bool((nearest[..., 0] == nearest[..., 1]).any())


def test_nearest_ranks_halfway_by_hand():
    levels = torch.tensor([[[-1.0, 0, 1, 4]]])
    latent = torch.tensor([[[-9, -0.5, -0.4999, 0, 0.5, 0.5001, 2.5, 2.5001, 9]]])
    assert nearest_ranks(latent, levels).tolist() == [[[0, 0, 1, 1, 1, 2, 2, 3, 3]]]


@pytest.mark.parametrize("equal", [(0, 0, 1, 2), (0, 1, 1, 2), (0, 1, 2, 2), (0, 0, 1, 1), (0, 1, 1, 1), (0, 0, 0, 0)])
def test_nearest_ranks_of_equal_levels(equal):
    # Which of two equal levels is named does not matter: the value is the nearest one, the lower one at halfway.
    levels = torch.tensor([[equal]], dtype=torch.float64)
    latent = torch.linspace(-1, 3, 33, dtype=torch.float64).view(1, 1, -1)
    wanted = levels.gather(2, (latent.unsqueeze(3) - levels.unsqueeze(2)).abs().argmin(3))
    assert torch.equal(levels.gather(2, nearest_ranks(latent, levels).long()), wanted)


def test_nearest_ranks_of_padding():
    # What lies beyond a ragged tail changes no other rank.
    g = _generator(1)
    latent, levels = _latents(3, 2, 16, g), _levels(3, 2, g)
    padded = latent.clone()
    padded[:, 1, 5:] = 0
    assert torch.equal(nearest_ranks(padded, levels)[:, 1, :5], nearest_ranks(latent, levels)[:, 1, :5])
    assert torch.equal(nearest_ranks(padded, levels)[:, 0], nearest_ranks(latent, levels)[:, 0])


@pytest.mark.parametrize(("out", "groups", "size"), SHAPES)
def test_bitmap_codes_against_loop(out, groups, size):
    latent, bitmap, levels = _bitmap_case(out, groups, size, 2)
    # Latents on the sign's threshold and bits at one half: both are code 0's.
    latent[0, 0, 0] = (levels[0, 0, 0] + levels[0, 0, 1]) / 2
    bitmap[0, 0, 0] = bitmap[-1, -1, -1] = 0.5
    codes = bitmap_codes(latent, bitmap, (levels[..., 0] + levels[..., 1]) / 2)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), _slow_codes(latent, bitmap, levels))
    assert int(codes[0, 0, 0]) == 0


@pytest.mark.parametrize(("out", "groups", "size"), SHAPES)
def test_nearest_level_forward(out, groups, size):
    g = _generator(3)
    latent, levels = _latents(out, groups, size, g), _levels(out, groups, g)
    found = nearest_level(latent, levels)
    picked = (latent.unsqueeze(3) - levels.unsqueeze(2)).abs().argmin(3)
    assert torch.equal(found, levels.gather(2, picked))
    assert torch.equal(NearestLevel.apply(latent, levels), found)


@pytest.mark.parametrize(("out", "groups", "size"), SHAPES)
def test_nearest_level_backward(out, groups, size):
    g = _generator(4)
    latent, levels = (torch.randn(out, groups, n, generator=g, dtype=torch.float64) for n in (size, 4))
    levels = levels.sort(2).values
    upstream = torch.randn(out, groups, size, generator=g, dtype=torch.float64)
    ranks = (latent.unsqueeze(3) - levels.unsqueeze(2)).abs().argmin(3)

    def surrogate(moved_latent, moved_levels):
        return moved_levels.gather(2, ranks) + (moved_latent - latent)

    by_latent, by_levels = _gradients(nearest_level, (latent, levels), upstream)
    wanted = (
        _differences(lambda x: surrogate(x, levels), latent, upstream),
        _differences(lambda x: surrogate(latent, x), levels, upstream),
    )
    # Measured: 4.6e-12 and 6.7e-12.
    torch.testing.assert_close(by_latent, wanted[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(by_levels, wanted[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize(("out", "groups", "size"), SHAPES)
def test_bitmap_level_forward(out, groups, size):
    latent, bitmap, levels = _bitmap_case(out, groups, size, 5)
    found = bitmap_level(latent, bitmap, levels)
    assert torch.equal(found, levels.gather(2, _slow_codes(latent, bitmap, levels)))
    assert torch.equal(BitmapLevel.apply(latent, bitmap, levels), found)


@pytest.mark.parametrize(("out", "groups", "size"), SHAPES)
def test_bitmap_level_backward(out, groups, size):
    latent, bitmap, levels = _bitmap_case(out, groups, size, 6)
    upstream = torch.randn(latent.shape, generator=_generator(7), dtype=torch.float64)
    codes = _slow_codes(latent, bitmap, levels)
    sign = codes % 2
    inner, outer = levels.gather(2, sign), levels.gather(2, sign + 2)
    found = _gradients(bitmap_level, (latent, bitmap, levels), upstream)
    wanted = (
        _differences(lambda x: levels.gather(2, codes) + (x - latent), latent, upstream),
        _differences(lambda x: (1 - x) * inner + x * outer, bitmap, upstream),
        _differences(lambda x: x.gather(2, codes), levels, upstream),
    )
    # Measured: 5.4e-12 at most.
    for gradient, differences in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, differences, atol=1e-10, rtol=0)


def test_bitmap_level_backward_of_pairs_that_crossed():
    # An inner pair outside of the outer one: more bitmap means less of the inner level, whatever their order.
    levels = torch.tensor([[[-3.0, 3, -1, 1]]], dtype=torch.float64)
    latent = torch.tensor([[[-2.0, 2, -2, 2]]], dtype=torch.float64)
    bitmap = torch.tensor([[[0.1, 0.1, 0.9, 0.9]]], dtype=torch.float64)
    assert bitmap_level(latent, bitmap, levels).tolist() == [[[-3.0, 3, -1, 1]]]
    _, by_bitmap, by_levels = _gradients(bitmap_level, (latent, bitmap, levels), torch.tensor([[[1.0, 2, 3, 5]]]))
    assert by_bitmap.tolist() == [[[2.0, -4, 6, -10]]]
    assert by_levels.tolist() == [[[1.0, 2, 3, 5]]]


@pytest.mark.parametrize("which", [0, 1])
def test_nearest_level_gives_only_the_gradients_asked_for(which):
    g = _generator(8)
    inputs = [_latents(2, 3, 16, g), _levels(2, 3, g)]
    inputs[which].requires_grad_()
    nearest_level(*inputs).sum().backward()
    assert [x.grad is not None for x in inputs] == [i == which for i in range(2)]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_bitmap_level_gives_only_the_gradients_asked_for(which):
    inputs = list(_bitmap_case(2, 3, 16, 9))
    inputs[which].requires_grad_()
    bitmap_level(*inputs).sum().backward()
    assert [x.grad is not None for x in inputs] == [i == which for i in range(3)]


class _Context:
    """What backward reads: shows what it returns for inputs that need nothing, which autograd would drop."""

    def __init__(self, saved, needs):
        self.saved_tensors, self.needs_input_grad = saved, needs


def test_backward_returns_none_for_what_is_not_needed():
    latent, bitmap, levels = _bitmap_case(2, 3, 16, 10)
    codes = bitmap_codes(latent, bitmap, levels[..., 0])
    for which in range(3):
        needs = tuple(i == which for i in range(3))
        returned = BitmapLevel.backward(_Context((codes, levels), needs), latent)
        assert tuple(x is not None for x in returned) == needs
    for which in range(2):
        needs = tuple(i == which for i in range(2))
        returned = NearestLevel.backward(_Context((codes,), needs), latent)
        assert tuple(x is not None for x in returned) == needs


def test_stored_levels_forward():
    levels = torch.randn(6, 3, 4, generator=_generator(11)) * 0.05
    wanted = level_values(*project_levels(levels))
    assert torch.equal(stored_levels(levels, 8, None, True), wanted)
    assert torch.equal(StoredLevels.apply(levels, 8, None, True), wanted)
    assert not torch.equal(wanted, levels)


def test_stored_levels_backward():
    # The surrogate is the identity. float32, because that is what a checkpoint's levels are.
    g = _generator(12)
    levels, upstream = (torch.randn(3, 2, 4, generator=g) for _ in range(2))
    (found,) = _gradients(lambda x: stored_levels(x, 8, None, True), (levels,), upstream)
    assert torch.equal(found, upstream)
    wanted = _differences(lambda x: x, levels.double(), upstream.double())
    # Measured: 1.8e-13.
    torch.testing.assert_close(found.double(), wanted, atol=1e-10, rtol=0)


class _Elsewhere(torch.Tensor):
    """Says that it lies on a GPU: takes the GPU's branch on the CPU."""

    device = torch.device("cuda")


@pytest.mark.parametrize("kind", [torch.Tensor, _Elsewhere])
@pytest.mark.parametrize(("out", "groups", "size"), SHAPES)
def test_sums_per_level_against_masked_sums(out, groups, size, kind):
    g = _generator(13)
    grad = torch.randint(-50, 51, (out, groups, size), generator=g).float()  # integers: exact in any order
    codes = torch.randint(0, 4, grad.shape, generator=g, dtype=torch.uint8)
    codes[0, 0] = 2  # levels without a weight
    wanted = torch.zeros(out, groups, 4)
    for r, k, level in torch.cartesian_prod(torch.arange(out), torch.arange(groups), torch.arange(4)).tolist():
        wanted[r, k, level] = sum(grad[r, k][codes[r, k] == level].tolist())
    found = sums_per_level(grad.as_subclass(kind), codes).as_subclass(torch.Tensor)
    assert torch.equal(found, wanted)


def _bits(g, *shape):
    """float64 bits in [0, 1], none within 0.05 of 1/2, where |2 G - 1|^1.5 has no second derivative."""
    sides = torch.randint(0, 2, shape, generator=g)
    return (0.45 * torch.rand(shape, generator=g, dtype=torch.float64) + 0.55 * sides).clamp(0.001, 0.999)


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0, 4.0, 20.0])
def test_polarisation_gradient_against_differences(beta):
    bitmap = _bits(_generator(14), 3, 2, 8)
    wanted = torch.zeros_like(bitmap)
    step = 1e-6
    for i in range(bitmap.numel()):
        moved = []
        for sign in (1, -1):
            x = bitmap.clone()
            x.view(-1)[i] += sign * step
            moved.append(polarisation(x, beta))
        wanted.view(-1)[i] = (moved[0] - moved[1]) / (2 * step)
    # Measured: 1.7e-10 at most; the largest gradients are 0.042 (beta 1) to 0.46 (beta 20).
    torch.testing.assert_close(polarisation_gradient(bitmap, beta, bitmap.numel()), wanted, atol=1e-8, rtol=0)


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0, 4.0, 20.0])
def test_polarisation_by_hand(beta):
    # Half of the bits certain, a quarter at 1/2, a quarter halfway between.
    bitmap = torch.tensor([[[0.0, 1, 0.5, 0.25]], [[1, 0, 0.5, 0.75]]])
    # Measured: 2.4e-8.
    assert polarisation(bitmap, beta) == pytest.approx((1 + 1 - 0.5**beta) / 4, abs=1e-6)
    assert polarisation(bitmap[..., :2], beta) == 0.0
    assert polarisation(bitmap[..., 2:3], beta) == 1.0
    assert not polarisation_gradient(bitmap, 4.0, 8)[..., 2].any()


def test_polarisation_gradient_shortcut():
    bitmap = _bits(_generator(15), 2, 3, 16)
    general = -2.0 * 2.0 * (2 * bitmap - 1).abs().pow(2.0 - 1) * (2 * bitmap - 1).sign() / 96
    # Measured: 6.9e-18.
    torch.testing.assert_close(polarisation_gradient(bitmap, 2, 96), general, atol=1e-15, rtol=0)
    nearly = polarisation_gradient(bitmap, 2 + 1e-9, 96)
    # Measured: 2.1e-11.
    torch.testing.assert_close(polarisation_gradient(bitmap, 2.0, 96), nearly, atol=1e-9, rtol=0)


@pytest.mark.parametrize("beta", [1.5, 2.0])
def test_polarisation_gradient_counts_weights_not_padding(beta):
    # 2 rows of 12 weights in groups of 8: 32 places, 24 weights.
    g = _generator(16)
    bits = _bits(g, 2, 12)
    padded = torch.cat([bits, _bits(g, 2, 4)], dim=1).view(2, 2, 8)
    kept = bits.clone()
    wanted = torch.zeros_like(bits)
    for i in range(bits.numel()):
        up, down = bits.clone(), bits.clone()
        up.view(-1)[i] += 1e-6
        down.view(-1)[i] -= 1e-6
        wanted.view(-1)[i] = (polarisation(up, beta) - polarisation(down, beta)) / 2e-6
    found = polarisation_gradient(padded, beta, bits.numel()).flatten(1)[:, :12]
    # Measured: 5e-11.
    torch.testing.assert_close(found, wanted, atol=1e-8, rtol=0)
    assert torch.equal(padded.flatten(1)[:, :12], kept)


def _same_weights(ranks, levels, size):
    """What `dequantize` gives for ranks [out, groups, size] and float levels in rank order."""
    stored, scale = project_levels(levels)
    codes, by_code = codes_from_ranks(ranks.flatten(1), stored, scale)
    return dequantize(codes, by_code, scale, size)


@pytest.mark.parametrize("magnitude", [1e-6, 0.05, 1e3])
@pytest.mark.parametrize(("out", "groups", "size"), [(5, 4, 16), (7, 3, 32)])
def test_nearest_level_gives_the_weights_of_the_format(out, groups, size, magnitude):
    g = _generator(17)
    latent, levels = (torch.randn(out, groups, n, generator=g) * magnitude for n in (size, 4))
    levels = levels.sort(2).values
    found = nearest_level(latent, stored_levels(levels, 8, None, True))
    ranks = (latent.double().unsqueeze(3) - stored_levels(levels, 8, None, True).double().unsqueeze(2)).abs().argmin(3)
    assert torch.equal(found.flatten(1), _same_weights(ranks.to(torch.uint8), levels, size))


@pytest.mark.parametrize("magnitude", [1e-6, 0.05, 1e3])
@pytest.mark.parametrize(("out", "groups", "size"), [(5, 4, 16), (7, 3, 32)])
def test_bitmap_level_gives_the_weights_of_the_format(out, groups, size, magnitude):
    latent, bitmap, levels = (x.float() for x in _bitmap_case(out, groups, size, 18))
    latent, levels = latent * magnitude, levels * magnitude
    stored = stored_levels(levels, 8, None, True)
    found = bitmap_level(latent, bitmap, stored)
    ranks, ascending = ranks_from_codes(_slow_codes(latent, bitmap, stored), levels)
    assert torch.equal(found.flatten(1), _same_weights(ranks, ascending, size))


def test_inputs_stay():
    latent, bitmap, levels = _bitmap_case(3, 2, 16, 19)
    ascending = levels.sort(2).values
    upstream = torch.randn(latent.shape, generator=_generator(20), dtype=torch.float64)
    tensors = (latent, bitmap, levels, ascending, upstream)
    kept = [x.clone() for x in tensors]
    for function, inputs in ((bitmap_level, tensors[:3]), (nearest_level, (latent, ascending))):
        function(*(x.detach().requires_grad_() for x in inputs)).backward(upstream)
    stored_levels(levels, 8, None, True)
    for beta in (1.5, 2):
        polarisation_gradient(bitmap, beta, 96)
    for now, before in zip(tensors, kept, strict=True):
        assert torch.equal(now, before)
