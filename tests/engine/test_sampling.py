"""Drawn tokens against chances worked out by hand."""

import numpy as np
import pytest

from lbllm_cli.engine.abi import library
from lbllm_cli.engine.location import library_path
from lbllm_cli.engine.model import Sampler, Sampling

if library_path() is None:
    pytest.skip("this installation has no compiled kernels", allow_module_level=True)

DRAWS = 4000


def chances(logits, settings: Sampling, before=()) -> np.ndarray:
    """Slowly: penalty, temperature, top_k, top_p, min_p, each as its name says."""
    scores = logits.astype(np.float64).copy()
    for token in set(before):
        scores[token] = scores[token] / settings.penalty if scores[token] > 0 else scores[token] * settings.penalty
    scores = scores / settings.temperature
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if settings.top_k:
        order = order[: settings.top_k]
    shares = np.exp(scores[order] - scores[order[0]])
    total, kept, reached = shares.sum(), [], 0.0
    for token, share in zip(order, shares, strict=True):
        if kept and reached >= settings.top_p * total:
            break
        kept.append(token)
        reached += share
    found = np.zeros(len(scores))
    for token in kept:
        share = np.exp(scores[token] - scores[order[0]])
        found[token] = share if share >= settings.min_p else 0.0
    return found / found.sum()


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(1.0), Sampling(0.5), Sampling(1.3, top_k=3), Sampling(1.0, top_p=0.6), Sampling(1.0, min_p=0.3),
        Sampling(0.8, top_k=150, top_p=0.9, min_p=0.05), Sampling(1.0, penalty=2.0), Sampling(1.0, top_p=0.999),
        Sampling(1.0, top_p=0.0),
    ],
)  # fmt: skip
def test_tokens_come_as_often_as_they_should(settings):
    logits = np.random.default_rng(5).normal(0, 2, 300).astype(np.float32)
    before = [int(token) for token in np.argsort(-logits)[:2]] * 2
    wanted = chances(logits, settings, before if settings.penalty != 1 else ())
    sampler = Sampler(library(), settings, seed=11)
    drawn = np.bincount([sampler.draw(logits.copy(), before) for _ in range(DRAWS)], minlength=300) / DRAWS
    assert not drawn[wanted == 0].any()
    # Five deviations of a share p of so many draws, and of the least share that shows.
    assert (np.abs(drawn - wanted) < 5 * np.sqrt(np.maximum(wanted, 1 / DRAWS) / DRAWS)).all()


def test_the_likeliest_token_and_the_first_on_a_tie():
    logits = np.array([0.5, 3.0, 3.0, -1.0], np.float32)
    assert Sampler(library(), Sampling(), 0).draw(logits.copy(), []) == 1
    assert Sampler(library(), Sampling(penalty=2.0), 0).draw(logits.copy(), [1]) == 2
    # Negative ones become smaller, and a token counts once however often it was there.
    assert Sampler(library(), Sampling(penalty=2.0), 0).draw(np.array([-1.0, -1.5], np.float32), [0, 0]) == 1
    assert Sampler(library(), Sampling(penalty=1.4), 0).draw(np.array([-1.0, -1.5], np.float32), [0, 0]) == 0


def test_equal_seeds_draw_equal_tokens():
    logits = np.random.default_rng(1).normal(0, 1, 50).astype(np.float32)

    def drawn(seed):
        sampler = Sampler(library(), Sampling(1.0), seed)
        return [sampler.draw(logits.copy(), []) for _ in range(20)]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert len(set(drawn(2**63 - 1))) > 3


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [1.0, np.nan], [1.0, np.inf], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_finite_is_not_drawn_from(bad, temperature):
    with pytest.raises(FloatingPointError):
        Sampler(library(), Sampling(temperature), 0).draw(np.array(bad, np.float32), [])


def test_tokens_without_any_chance_are_let_be():
    logits = np.array([-np.inf, 1.0, -np.inf], np.float32)
    sampler = Sampler(library(), Sampling(1.0, top_p=0.9), 0)
    assert {sampler.draw(logits.copy(), []) for _ in range(50)} == {1}


def test_settings_out_of_range_are_refused():
    negative = Sampling(-1.0), Sampling(1.0, -3), Sampling(1.0, min_p=-0.1)
    for settings in (*negative, Sampling(1.0, top_p=1.5), Sampling(1.0, penalty=0.0)):
        with pytest.raises(ValueError, match="a size"):
            Sampler(library(), settings, 0).draw(np.zeros(4, np.float32), [])
