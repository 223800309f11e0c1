"""Errors of a block's output, against loops over tokens."""

import math
import statistics

import pytest
import torch

from lbllm_cli.pipeline.metrics import BlockError, channel_scale, massive_tokens, robust_error


def _hidden(seed, shape=(3, 7, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _with_massive(seed):
    hidden = _hidden(seed)
    hidden[:, 0] *= 60
    hidden[1, 4] *= 25
    return hidden


def test_massive_tokens_found():
    found = massive_tokens(_with_massive(0))
    wanted = torch.zeros(3, 7, dtype=torch.bool)
    wanted[:, 0] = True
    wanted[1, 4] = True
    assert torch.equal(found, wanted)
    assert not massive_tokens(_hidden(1)).any()


def test_massive_is_ten_times_the_median():
    hidden = torch.zeros(1, 5, 2)
    hidden[0, :, 0] = torch.tensor([1.0, 1.0, 1.0, 9.9, 10.1])
    assert massive_tokens(hidden).tolist() == [[False, False, False, False, True]]
    assert massive_tokens(-3 * hidden).tolist() == [[False, False, False, False, True]]


def test_channels_are_scaled_down_to_the_cap_and_never_up():
    hidden = _hidden(2, (2, 40, 5)) * torch.tensor([2.0, 1.0, 300.0, 0.1, 1.0])
    # A massive token, in a channel that ordinary tokens hardly use.
    hidden[1, 7, 3] = 1e6
    energy = [sum(v * v for v in (hidden[..., c].flatten().tolist())) for c in range(5)]
    energy[3] -= 1e12
    # The massive token's other channels do not count either.
    energy = [e - hidden[1, 7, c].item() ** 2 * (c != 3) for c, e in enumerate(energy)]
    wanted = [math.sqrt(min(1.0, 50 * statistics.median(energy) / e)) for e in energy]
    found = channel_scale(hidden, 50)
    assert found[[0, 1, 3, 4]].tolist() == [1.0] * 4
    # Measured: 1e-7.
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert wanted[2] < 0.1


def test_a_median_channel_without_energy_caps_nothing():
    hidden = torch.zeros(1, 3, 3)
    hidden[..., 0] = 2.0
    assert channel_scale(hidden, 4).tolist() == [1.0, 1.0, 1.0]


def test_block_error_against_loop():
    error = energy = ordinary_error = ordinary_energy = 0.0
    found = BlockError()
    for seed in range(3):
        teacher = _with_massive(seed)
        student = teacher + 0.1 * _hidden(seed + 10) * (1 + teacher.abs())
        # A student that lost a massive token: the teacher decides which are left out.
        student[2, 0] *= 0.01
        found.add(teacher, student)
        wanted, given = teacher.flatten(0, 1).tolist(), student.flatten(0, 1).tolist()
        norms = [math.sqrt(sum(v * v for v in token)) for token in wanted]
        limit = 10 * statistics.median(norms)
        for token, other, norm in zip(wanted, given, norms, strict=True):
            distance = sum((a - b) ** 2 for a, b in zip(token, other, strict=True))
            error += distance
            energy += norm**2
            if norm <= limit:
                ordinary_error += distance
                ordinary_energy += norm**2
    # Measured: 5e-8.
    assert found.error == pytest.approx(error, rel=1e-5)
    assert found.energy == pytest.approx(energy, rel=1e-5)
    assert found.relative == pytest.approx(error / energy, rel=1e-5)
    assert found.relative_ordinary == pytest.approx(ordinary_error / ordinary_energy, rel=1e-5)
    # The two differ on this data, or the last line would prove little: massive tokens carry nearly all energy.
    assert ordinary_energy < 0.05 * energy
    assert found.finite


def test_same_output_has_no_error():
    found = BlockError()
    found.add(_hidden(0), _hidden(0))
    assert (found.relative, found.relative_ordinary, found.finite) == (0.0, 0.0, True)


def test_16_bit_outputs_are_summed_in_float32():
    teacher, student = _hidden(0).bfloat16(), _hidden(1).bfloat16()
    narrow, wide = BlockError(), BlockError()
    narrow.add(teacher, student)
    wide.add(teacher.float(), student.float())
    sums = ("error", "energy", "ordinary_error", "ordinary_energy", "cosine")
    assert [getattr(narrow, name) for name in sums] == [getattr(wide, name) for name in sums]


def test_nothing_added():
    assert (BlockError().relative, BlockError().relative_ordinary) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_not_finite(bad, side):
    states = {"teacher": _hidden(0), "student": _hidden(1)}
    states[side][1, 2, 3] = bad
    found = BlockError()
    found.add(**states)
    assert not found.finite


def test_robust_error_is_hubers_loss_on_distances():
    error = torch.tensor([0.0, 1.0, 99.9, 100.0, 400.0, 1e6])
    distance = error.double().sqrt()
    expected = torch.where(distance <= 10, distance**2, 2 * 10 * distance - 100)
    torch.testing.assert_close(robust_error(error, 1.0).double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(robust_error(error, 1e5), error)  # nothing is far off: bit for bit the squared error
    free = error.clone().requires_grad_()
    robust_error(free, 1.0).sum().backward()
    # d/d distance = 2 distance * d/d error: it stops growing at the threshold.
    pull = 2 * error.sqrt() * free.grad
    assert pull[2] < 20
    torch.testing.assert_close(pull[3:], torch.full((3,), 20.0))
