"""Linears in training: where they start, what constrain and packed make of any state, what each kind of parameter moves."""

import pytest
import torch

from lbllm_cli.format.levels import level_values, project_levels
from lbllm_cli.format.weights import PackedWeight, grouped, unpack_codes
from lbllm_cli.training.master import BITMAP, LEVELS, WEIGHTS
from lbllm_cli.training.weights import PARAMETRISATIONS, Bitmap, Nearest

SHAPES = [(5, 64, 16), (7, 72, 32), (3, 48, 16)]
MARGINS = [0, 0.1, 0.5, 1]
KINDS = {"nearest": {WEIGHTS, LEVELS}, "bitmap": {WEIGHTS, LEVELS, BITMAP}}
# Ascending levels that are not distinct, in steps of the scale.
EQUAL = [
    (60, 60, 60, 60), (-127, -127, 3, 90), (-40, 5, 5, 127), (-127, -5, 50, 50), (-127, -127, 64, 64), (-20, -20, -20, 127),
    (-127, 30, 30, 30), (0, 0, 0, 0), (0, 0, 0, 127), (-127, 0, 0, 0), (40, 127, 127, 127),
]  # fmt: skip
# Ascending levels far from zero compared with their distances.
NARROW = [(125, 126, 126, 127), (-127, -126, -126, -125), (126, 127, 127, 127), (124, 125, 126, 127)]


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _packed(ranks, levels, size):
    stored, scale = project_levels(levels)
    return PackedWeight.of_ranks(ranks, stored, scale, size)


def _parts(packed):
    return packed.codes, packed.levels, packed.scale


def _case(out, inn, size, seed=0, magnitude=1.0):
    """Source weight and packed tensors: levels at least 8 steps apart, codes at random, so mostly not the nearest."""
    g = _generator(seed)
    groups = -(-inn // size)
    steps = torch.stack([torch.randperm(31, generator=g)[:4] for _ in range(out * groups)]).sort(1).values
    levels = (steps.view(out, groups, 4) - 15) * (0.1 * magnitude * (0.5 + torch.rand(out, groups, 1, generator=g)))
    ranks = torch.randint(0, 4, (out, inn), generator=g, dtype=torch.uint8)
    return torch.randn(out, inn, generator=g) * magnitude, _packed(ranks, levels, size)


def _degenerate(size, seed):
    """As `_case`, one row per entry of EQUAL, three groups each."""
    g = _generator(seed)
    levels = torch.tensor(EQUAL).float().unsqueeze(1).repeat(1, 3, 1) * 2.0**-10
    ranks = torch.randint(0, 4, (len(EQUAL), 3 * size - 5), generator=g, dtype=torch.uint8)
    return torch.randn(ranks.shape, generator=g) * 0.05, _packed(ranks, levels, size)


def _perturb(linear, seed):
    """A step: forward pass, then every parameter is moved by noise, bitmaps by half their range, all else by a typical weight."""
    linear()
    g = _generator(seed)
    with torch.no_grad():
        for kind, parameters in linear.kinds().items():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.5 if kind == BITMAP else linear.rms)


def _assert_contract(packed):
    """Bitmap 0 is the inner pair, sign 1 the larger of a pair; dtypes as stored."""
    weight, levels, scale = _parts(packed)
    assert [t.dtype for t in _parts(packed)] == [torch.uint8, torch.int8, torch.float16]
    ascending = levels[..., [2, 0, 1, 3]].short()
    assert bool((ascending.diff(dim=2) >= 0).all())
    assert weight.shape[:2] == levels.shape[:2] == scale.shape


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_start_is_the_packed_weight(name, out, inn, size, margin):
    weight, packed = _case(out, inn, size)
    for train in (KINDS[name], {LEVELS}, {WEIGHTS}):
        linear = PARAMETRISATIONS[name](weight, packed, train, margin)
        assert torch.equal(linear(), packed.values())
        for now, before in zip(_parts(linear.packed()), _parts(packed), strict=True):
            assert now.dtype == before.dtype
            assert torch.equal(now, before)


def test_latents_start_from_levels_that_crossed():
    """As training with fixed codes may leave them."""
    weight, packed = _case(7, 72, 32)
    crossed = PackedWeight(packed.codes, packed.levels.flip(-1).contiguous(), packed.scale, 72)
    linear = Nearest(weight, crossed, {WEIGHTS, LEVELS}, 0.1)
    assert torch.equal(linear(), crossed.values())
    assert torch.equal(linear.packed().values(), crossed.values())
    _assert_contract(linear.packed())


def test_case_has_codes_that_are_not_the_nearest():
    weight, packed = _case(7, 72, 32)
    values = level_values(packed.levels, packed.scale)
    nearest = (grouped(weight, 32).unsqueeze(3) - values.unsqueeze(2)).abs().argmin(3).flatten(1)[:, :72]
    # By chance a quarter are. Measured: 0.27.
    assert float((nearest == packed.unpacked()).float().mean()) < 0.35


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_start_of_degenerate_groups(name, size, margin):
    weight, packed = _degenerate(size, 1)
    assert int((packed.scale == 0).sum()) == 3
    for train in (KINDS[name], {LEVELS}):
        linear = PARAMETRISATIONS[name](weight, packed, train, margin)
        assert torch.equal(linear(), packed.values())
        # Codes of equal levels may be exchanged, the weights not.
        assert torch.equal(linear.packed().values(), packed.values())
        _assert_contract(linear.packed())


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_start_of_small_weights(name):
    weight, packed = _case(40, 64, 16, 1, magnitude=3e-4)
    linear = PARAMETRISATIONS[name](weight, packed, KINDS[name], 0.1)
    assert torch.equal(linear(), packed.values())


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("steps", NARROW)
@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_start_of_narrow_groups(name, steps, margin):
    # Weights far on both sides of every level.
    ranks = torch.tensor([[0, 1, 2, 3] * 8], dtype=torch.uint8)
    packed = _packed(ranks, torch.tensor([[steps, steps]]) * 2.0**-10, 16)
    weight = torch.tensor([[-0.2] * 4 + [0.2] * 4]).repeat(1, 4)
    linear = PARAMETRISATIONS[name](weight, packed, KINDS[name], margin)
    assert torch.equal(linear(), packed.values())


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_start_leaves_its_arguments(name):
    weight, packed = _case(5, 64, 16)
    kept = [t.clone() for t in (weight, *_parts(packed))]
    linear = PARAMETRISATIONS[name](weight, packed, KINDS[name], 0.1)
    _perturb(linear, 2)
    linear.constrain(0)
    for now, before in zip((weight, *_parts(packed)), kept, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_start_of_bfloat16_weights(name):
    weight, packed = _case(5, 64, 16)
    linear = PARAMETRISATIONS[name](weight.bfloat16(), packed, KINDS[name], 0.1)
    assert {p.dtype for p in linear.parameters()} == {torch.float32}
    assert torch.equal(linear(), packed.values())


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_rms(name):
    weight, packed = _case(7, 72, 32)
    linear = PARAMETRISATIONS[name](weight, packed, KINDS[name], 0.1)
    # Padding is not in it. Measured: 5.6e-8.
    assert linear.rms == pytest.approx(float(weight.double().square().mean().sqrt()), abs=5e-7)


def test_a_bitmap_that_is_not_trained_is_whole():
    weight, packed = _case(5, 64, 16)
    whole = Bitmap(weight, packed, KINDS["bitmap"], 1)
    assert torch.equal(Bitmap(weight, packed, {LEVELS}, 0).bitmap, whole.bitmap)
    # Each kind has its own margin: the latent's stays where only the bitmap is frozen.
    mixed = Bitmap(weight, packed, {WEIGHTS, LEVELS}, 0.1)
    assert torch.equal(mixed.bitmap, whole.bitmap)
    assert torch.equal(mixed.latent, Bitmap(weight, packed, KINDS["bitmap"], 0.1).latent)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_packed_is_the_forward_pass(name, out, inn, size, seed):
    weight, packed = _case(out, inn, size, seed)
    linear = PARAMETRISATIONS[name](weight, packed, KINDS[name], 0.1)
    _perturb(linear, seed)
    crossed = _crossed(linear)
    linear.constrain(0.1)
    now = linear.packed()
    assert torch.equal(now.values(), linear())
    assert not torch.equal(linear(), packed.values())
    _assert_contract(now)
    # Measured: 0.67 of the groups at least.
    assert crossed > 0.3


def _crossed(linear):
    """Share of groups whose levels left their order."""
    if isinstance(linear, Nearest):
        ascending = linear.levels
    else:
        ascending = torch.cat([linear.mu - linear.alpha, linear.mu + linear.alpha], -1)[..., [1, 0, 2, 3]]
    return float((ascending.diff(dim=2) < 0).any(2).float().mean())


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_packed_is_the_forward_pass_of_small_weights(name):
    weight, packed = _case(40, 64, 16, 2, magnitude=3e-4)
    linear = PARAMETRISATIONS[name](weight, packed, KINDS[name], 0.1)
    _perturb(linear, 3)
    linear.constrain(0)
    assert torch.equal(linear.packed().values(), linear())


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_packed_of_degenerate_groups_in_training(name):
    weight, packed = _degenerate(16, 5)
    linear = PARAMETRISATIONS[name](weight, packed, KINDS[name], 0.1)
    with torch.no_grad():
        linear()
        linear.latent.add_(0.02 * torch.randn(linear.latent.shape, generator=_generator(6)))
    linear.constrain(0)
    assert torch.equal(linear.packed().values(), linear())
    _assert_contract(linear.packed())


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_packed_names_pairs_that_crossed_again(out, inn, size):
    weight, packed = _case(out, inn, size)
    linear = Bitmap(weight, packed, KINDS["bitmap"], 0.1)
    with torch.no_grad():
        for parameter in (linear.alpha, linear.mu):
            parameter.copy_(parameter.flip(-1))
    # The pair named inner is now the outer one of every group.
    now = linear.packed()
    assert torch.equal(now.values(), linear())
    _assert_contract(now)
    assert torch.equal(now.levels, packed.levels)


def test_packed_by_hand():
    # Inner pair -3, 3, outer pair 1, 2: ranks -3, 1, 2, 3, so that -3 and 3 become the outer pair.
    _, packed = _case(1, 16, 16)
    linear = Bitmap(torch.zeros(1, 16), packed, KINDS["bitmap"], 0.1)
    with torch.no_grad():
        linear.mu.copy_(torch.tensor([0, 1.5]))
        linear.alpha.copy_(torch.tensor([3, 0.5]))
        linear.latent.copy_(torch.tensor([-1.0, 1, -1, 1]).repeat(4))
        linear.bitmap.copy_(torch.tensor([0.0, 0, 1, 1]).repeat(4))
    codes, levels, _ = _parts(linear.packed())
    assert unpack_codes(codes, 16).tolist() == [[2, 3, 0, 1] * 4]
    # Stored in steps of 3 / 127.
    assert levels.tolist() == [[[42, 85, -127, 127]]]
    assert torch.equal(linear(), linear.packed().values())


def test_packed_of_levels_that_crossed_by_hand():
    _, packed = _case(1, 16, 16)
    linear = Nearest(torch.zeros(1, 16), packed, KINDS["nearest"], 0.1)
    linear()
    with torch.no_grad():
        linear.levels.copy_(torch.tensor([2.0, -3, 3, 1]))
        linear.latent.copy_(torch.tensor([-4.0, 0.9, 1.6, 9]).repeat(4))
    linear.constrain(0)
    codes, levels, _ = _parts(linear.packed())
    assert unpack_codes(codes, 16).tolist() == [[2, 0, 1, 3] * 4]
    assert levels.tolist() == [[[42, 85, -127, 127]]]


@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("nearest", {WEIGHTS}), ("nearest", {WEIGHTS, LEVELS}),
        ("bitmap", {WEIGHTS}), ("bitmap", {LEVELS}), ("bitmap", {BITMAP}), ("bitmap", {WEIGHTS, BITMAP}),
        ("bitmap", {WEIGHTS, LEVELS, BITMAP}),
    ],
)  # fmt: skip
def test_train_decides_what_gets_gradients(name, train):
    weight, packed = _case(7, 72, 32)
    linear = PARAMETRISATIONS[name](weight, packed, train, 0.1)
    linear().square().sum().backward()
    assert set(linear.kinds()) == KINDS[name]
    assert {id(p) for group in linear.kinds().values() for p in group} == {id(p) for p in linear.parameters()}
    for kind, parameters in linear.kinds().items():
        for parameter in parameters:
            assert (parameter.grad is not None) == (kind in train) == parameter.requires_grad
            assert parameter.grad is None or bool(parameter.grad.any())


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_gradients_of_a_linear(name):
    # levels: sums over the weights on each, by rank; alpha and mu: half a turn of these.
    weight, packed = _case(7, 72, 32)
    linear = PARAMETRISATIONS[name](weight, packed, KINDS[name], 0.1)
    upstream = torch.randn(7, 72, generator=_generator(7))
    linear().backward(upstream)
    codes, by_group = grouped(packed.unpacked(), 32), grouped(upstream, 32)
    assert torch.equal(linear.latent.grad, by_group)
    wanted = torch.stack([(by_group * (codes == code)).sum(2) for code in range(4)], 2)
    if isinstance(linear, Nearest):
        found = {"levels": (linear.levels.grad, wanted[..., [2, 0, 1, 3]])}
    else:
        low, high = wanted[..., 0::2], wanted[..., 1::2]
        values = level_values(packed.levels, packed.scale)
        signs = (codes % 2).long()
        width = (values[..., 2:] - values[..., :2]).gather(2, signs)
        found = {
            "alpha": (linear.alpha.grad, high - low),
            "mu": (linear.mu.grad, high + low),
            "bitmap": (linear.bitmap.grad, by_group * width),
        }
    for gradient, reference in found.values():
        # Measured: 1.4e-6.
        torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_frozen_latents_keep_their_signs_wherever_levels_go(out, inn, size):
    for seed in range(5):
        weight, packed = _case(out, inn, size, seed)
        linear, free = (Bitmap(weight, packed, train, 0) for train in ({LEVELS, BITMAP}, KINDS["bitmap"]))
        # By more than a group reaches: pairs change sides.
        moved = _moved_levels(packed, seed) + 3 * level_values(packed.levels, packed.scale).abs().amax(2, keepdim=True)
        for one in (linear, free):
            one()
            _set_levels(one, moved)
            one.constrain(0)
        assert torch.equal(linear.packed().codes, packed.codes)
        assert not torch.equal(linear.packed().levels, packed.levels)
        # With the weights free, and no margin, the same step changes codes.
        assert not torch.equal(free.packed().codes, packed.codes)


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_what_no_token_was_sent_to_stays_where_it_is(name):
    """An expert: its weights were put into the block, and no gradient came back."""
    weight, packed = _case(5, 64, 16)
    linear = PARAMETRISATIONS[name](weight, packed, KINDS[name], 0.1)
    before = linear.latent.detach().clone()
    for _ in range(3):
        linear.put(torch.empty(5, 64))
        linear.skip()
        linear.constrain(0.25)
    assert torch.equal(linear.latent, before)
    linear.put(torch.empty(5, 64))
    linear.take(torch.ones(5, 64))
    linear.constrain(0.25)
    assert not torch.equal(linear.latent, before)
    linear.put(torch.empty(5, 64))
    linear.skip()
    before = linear.latent.detach().clone()
    linear.constrain(0.25)
    assert torch.equal(linear.latent, before)


def _moved_levels(packed, seed):
    """Ascending levels, each moved by a fifth of the gap to the nearest other, up or down."""
    levels = level_values(packed.levels, packed.scale).sort(2).values
    gaps = levels.diff(dim=2)
    gap = torch.minimum(torch.cat([gaps, gaps[..., -1:]], 2), torch.cat([gaps[..., :1], gaps], 2))
    return levels + 0.2 * gap * (2 * torch.randint(0, 2, gap.shape, generator=_generator(seed)) - 1)


def _set_levels(linear, ascending):
    with torch.no_grad():
        if isinstance(linear, Nearest):
            linear.levels.copy_(ascending)
        else:
            low, high = ascending[..., [1, 0]], ascending[..., [2, 3]]
            linear.alpha.copy_((high - low) / 2)
            linear.mu.copy_((high + low) / 2)


@pytest.mark.parametrize("beta", [1.5, 2.0, 4.0])
@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_polarise_adds_the_gradient(out, inn, size, beta):
    weight, packed = _case(out, inn, size)
    linear = Bitmap(weight, packed, KINDS["bitmap"], 0.1)
    before = torch.randn(linear.bitmap.shape, generator=_generator(8))
    linear.bitmap.grad = before.clone()
    linear.polarise(0.7, beta, 100)
    added = linear.bitmap.grad.double() - before.double()
    centred = 2 * linear.bitmap.detach().double() - 1
    wanted = 0.7 * -2 * beta / 100 * centred.abs().pow(beta - 1) * centred.sign()
    # Measured: 1.2e-7, the rounding of the sum.
    torch.testing.assert_close(added.flatten(1)[:, :inn], wanted.flatten(1)[:, :inn], atol=1e-6, rtol=0)


def test_polarise_pushes_away_from_one_half():
    weight, packed = _case(7, 72, 32)
    linear = Bitmap(weight, packed, KINDS["bitmap"], 0.1)
    optimizer = torch.optim.SGD(linear.kinds()[BITMAP], lr=0.5)
    before, certainty = linear.bitmap.detach().clone(), linear.certainty()
    linear.bitmap.grad = torch.zeros_like(linear.bitmap)
    linear.polarise(1.0, 2.0, 7 * 72)
    optimizer.step()
    moved = (linear.bitmap.detach() - before).flatten(1)[:, :72]
    side = (before - 0.5).sign().flatten(1)[:, :72]
    assert bool((moved * side > 0).all())
    assert linear.certainty() > certainty


def test_certainty_without_padding():
    weight, packed = _case(7, 72, 32)
    linear = Bitmap(weight, packed, KINDS["bitmap"], 0.1)
    bits = linear.bitmap.detach().flatten(1)
    bits[:, 72:] = 0.5
    bits[:, :72] = 1
    assert linear.certainty() == 1
    bits[:, 72:] = 0
    bits[:, :72] = 0.5
    assert linear.certainty() == 0
    bits[:, :36] = 0.25
    assert linear.certainty() == pytest.approx(0.25, abs=1e-6)  # measured: no difference


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_nearest_constrain_sorts_the_levels(out, inn, size):
    weight, packed = _case(out, inn, size)
    linear = Nearest(weight, packed, KINDS["nearest"], 0.1)
    linear()
    linear.constrain(0)
    assert torch.equal(linear.levels, level_values(packed.levels, packed.scale).sort(2).values)
    _perturb(linear, 9)
    wanted = [[sorted(group) for group in row] for row in linear.levels.tolist()]
    kept = linear.latent.detach().clone()
    linear.constrain(0)
    assert linear.levels.tolist() == wanted
    assert torch.equal(linear.latent, kept)


@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_bitmap_constrain_keeps_ranges(out, inn, size):
    weight, packed = _case(out, inn, size)
    linear = Bitmap(weight, packed, KINDS["bitmap"], 0.1)
    _perturb(linear, 10)
    kept = {name: parameter.detach().clone() for name, parameter in linear.named_parameters()}
    assert float(kept["bitmap"].min()) < 0
    assert float(kept["bitmap"].max()) > 1
    assert float(kept["alpha"].min()) < 0
    linear.constrain(0)
    wanted = {**kept, "bitmap": kept["bitmap"].clamp(0, 1), "alpha": kept["alpha"].clamp(min=0)}
    for name, parameter in linear.named_parameters():
        assert torch.equal(parameter, wanted[name])


@pytest.mark.parametrize("share", [0, 0.003, 0.25])
@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_constrain_pulls_latents_towards_their_level(name, out, inn, size, share):
    weight, packed = _case(out, inn, size)
    linear = PARAMETRISATIONS[name](weight, packed, KINDS[name], 0.1)
    linear.put(torch.empty(out, inn))
    linear.take(torch.zeros(out, inn))
    _perturb(linear, 11)
    before = linear.latent.detach().clone().double()
    if name == "nearest":
        # The forward pass was that of the start, not of the moved levels.
        goal = packed.values().double()
    else:
        mean, reach = linear.mu[..., :1].double(), linear.alpha[..., :1].double()
        goal = torch.where(linear.latent > linear.mu[..., :1], mean + reach, mean - reach).flatten(1)[:, :inn]
    linear.constrain(share)
    wanted = torch.lerp(before.flatten(1)[:, :inn], goal, share)
    # Measured: 1.6e-7.
    torch.testing.assert_close(linear.latent.detach().flatten(1)[:, :inn].double(), wanted, atol=2e-6, rtol=0)


def test_dampening_alone_changes_no_sign():
    """Pulled to an outer level that lies on the other side of mu0, a latent would cross it without any gradient."""
    weight, packed = _case(5, 64, 16)
    linear = PARAMETRISATIONS["bitmap"](weight, packed, KINDS["bitmap"], 0.1)
    with torch.no_grad():
        linear.mu.copy_(torch.tensor([0.0, 1.5]).expand_as(linear.mu))
        linear.alpha.copy_(torch.tensor([1.0, 0.5]).expand_as(linear.alpha))
        linear.latent.fill_(-0.2)
        linear.bitmap.fill_(0.9)
    before = linear.packed().codes
    for _ in range(1000):
        linear.constrain(0.01)
    assert torch.equal(linear.packed().codes, before)
