"""Latent weights and bitmaps at the start of training, against the cell that their code leaves them."""

import pytest
import torch

from lbllm_cli.format.levels import level_values, project_levels
from lbllm_cli.format.weights import codes_from_ranks, grouped, pack_codes, ranks_from_codes, unpack_codes
from lbllm_cli.training.latent import bitmap_latents, nearest_latents
from lbllm_cli.training.ste import bitmap_codes, nearest_ranks

SHAPES = [(5, 64, 16), (7, 72, 32), (3, 48, 16)]
MARGINS = [0, 0.1, 0.5, 1]
# A margin of 0 is raised to this share of the way to the level.
LEAST = 1e-3


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _packed(ranks, levels, size):
    stored, scale = project_levels(levels)
    codes, by_code = codes_from_ranks(ranks, stored, scale)
    return pack_codes(codes, size), by_code, scale


def _case(out, inn, size, seed=0, magnitude=1.0):
    """Source weight and packed tensors: levels at least 8 steps apart, codes at random, so mostly not the nearest."""
    g = _generator(seed)
    groups = -(-inn // size)
    steps = torch.stack([torch.randperm(31, generator=g)[:4] for _ in range(out * groups)]).sort(1).values
    levels = (steps.view(out, groups, 4) - 15) * (0.1 * magnitude * (0.5 + torch.rand(out, groups, 1, generator=g)))
    ranks = torch.randint(0, 4, (out, inn), generator=g, dtype=torch.uint8)
    return torch.randn(out, inn, generator=g) * magnitude, _packed(ranks, levels, size)


def _latent_case(out, inn, size, seed):
    """Grouped weight, levels in code order, codes."""
    weight, packed = _case(out, inn, size, seed)
    return grouped(weight, size), level_values(packed[1], packed[2]), grouped(unpack_codes(packed[0], inn), size)


def _positions(weight):
    return torch.cartesian_prod(*(torch.arange(n) for n in weight.shape)).tolist()


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_nearest_latents_against_the_cell(out, inn, size, margin):
    weight, levels, codes = _latent_case(out, inn, size, 3)
    ranks, levels = ranks_from_codes(codes, levels)
    latent = nearest_latents(weight, levels, ranks, margin)
    unchanged = moved = 0
    for r, k, j in _positions(weight):
        rank, four, w = int(ranks[r, k, j]), levels[r, k].tolist(), float(weight[r, k, j])
        # The cell of a level reaches halfway to its neighbours.
        edges = [(four[rank] + four[near]) / 2 for near in (rank - 1, rank + 1) if 0 <= near < 4]
        bounds = [edge + max(margin, LEAST) * (four[rank] - edge) for edge in edges]
        wanted = w
        for edge, bound in zip(edges, bounds, strict=True):
            wanted = max(wanted, bound) if edge < four[rank] else min(wanted, bound)
        if wanted == w:
            unchanged += 1
            assert float(latent[r, k, j]) == w
        else:
            moved += 1
            # Measured: 5.9e-8.
            assert float(latent[r, k, j]) == pytest.approx(wanted, abs=5e-7)
    assert unchanged > 10
    assert moved > 50
    assert torch.equal(nearest_ranks(latent, levels), ranks)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize(("out", "inn", "size"), SHAPES)
def test_bitmap_latents_against_the_cell(out, inn, size, margin):
    weight, levels, codes = _latent_case(out, inn, size, 4)
    bitmap_margin = 0.3 if margin else 0  # another than the latent's
    latent, bitmap = bitmap_latents(weight, levels, codes, margin, bitmap_margin)
    unchanged = moved = 0
    for r, k, j in _positions(weight):
        code, four, w = int(codes[r, k, j]), levels[r, k].tolist(), float(weight[r, k, j])
        inner, outer = four[code % 2], four[code % 2 + 2]
        mean = (four[0] + four[1]) / 2
        bound = mean + max(margin, LEAST) * (inner - mean)
        wanted = max(w, bound) if code % 2 else min(w, bound)
        unchanged += wanted == w
        moved += wanted != w
        # Measured: 1.2e-7; unchanged weights too are rounded once.
        assert float(latent[r, k, j]) == pytest.approx(wanted, abs=1e-6)
        share = min(max((w - inner) / (outer - inner), 0), 1)
        edge = max(bitmap_margin, LEAST) / 2
        share = max(share, 0.5 + edge) if code > 1 else min(share, 0.5 - edge)
        # Measured: 5.1e-8.
        assert float(bitmap[r, k, j]) == pytest.approx(share, abs=1e-6)
    assert unchanged > 10
    assert moved > 50
    assert torch.equal(bitmap_codes(latent, bitmap, (levels[..., 0] + levels[..., 1]) / 2), codes)


def test_bitmap_latents_of_equal_levels():
    # Nowhere between two equal levels is the weight's place: the bit starts next to 1/2, for weights on the level too.
    weight = torch.tensor([[[0.5, 0.5, -1, -1]]])
    codes = torch.tensor([[[0, 2, 1, 3]]], dtype=torch.uint8)
    latent, bitmap = bitmap_latents(weight, torch.full((1, 1, 4), 0.5), codes, 0.1, 0.1)
    assert bool(torch.isfinite(latent).all())
    # Measured: 1.2e-8.
    torch.testing.assert_close(bitmap, torch.tensor([[[0.45, 0.55, 0.45, 0.55]]]), atol=1e-6, rtol=0)
