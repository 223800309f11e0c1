"""Agreement with the teacher against sums written out, position by position."""

import math

import pytest
import torch

from lbllm_cli.training.agreement import Agreement, Predictions, octaves, perplexity


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sums_equal_a_loop_over_positions():
    segments, length, vocab = 3, 10, 17
    teacher, student = logits(0, segments, length - 1, vocab), logits(1, segments, length - 1, vocab)
    wanted = torch.randint(0, vocab, (segments, length - 1), generator=torch.Generator().manual_seed(2))
    found = Agreement(length)
    for row in range(segments):
        for start, end in ((0, 4), (4, length - 1)):
            pieces = (Predictions(x[row, start:end]) for x in (teacher, student))
            found.add(start, *pieces, wanted[row, start:end])

    nll, divergence, same = torch.zeros(length - 1, dtype=torch.float64), 0.0, 0
    for row in range(segments):
        for position in range(length - 1):
            p = torch.softmax(teacher[row, position].double(), 0)
            q = torch.softmax(student[row, position].double(), 0)
            nll[position] -= math.log(q[wanted[row, position]])
            divergence += float(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
            same += int(p.argmax() == q.argmax())
    count = segments * (length - 1)
    assert found.positions == count
    assert found.mean_divergence == pytest.approx(divergence / count, rel=1e-5)  # measured 1e-7
    assert found.top1 == same / count
    assert found.perplexity == pytest.approx(math.exp(float(nll.sum()) / count), rel=1e-5)
    for part in found.by_position():
        mean = float(nll[part["first"] - 1 : part["last"]].mean()) / segments
        assert part["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_a_teacher_agrees_with_itself_exactly():
    one, other = Predictions(logits(0, 8, 33)), Predictions(logits(0, 8, 33))
    for student in (one, other):
        found = Agreement(9)
        found.add(0, one, student, torch.arange(8))
        assert (found.mean_divergence, found.top1, found.positions) == (0.0, 1.0, 8)


def test_divergence_is_that_of_the_student_from_the_teacher():
    # KL(p || q) with p = (1, 0) in the limit is -log q[0]; the other way round it is without bound.
    teacher, student = Predictions(torch.tensor([[40.0, 0.0]])), Predictions(torch.tensor([[0.0, 0.0]]))
    found = Agreement(2)
    found.add(0, teacher, student, torch.tensor([0]))
    assert found.mean_divergence == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 10, 1023])
def test_octaves_cover_every_position_once(count):
    assert [p for first, last in octaves(count) for p in range(first, last + 1)] == list(range(1, count + 1))


def test_what_is_not_finite_is_seen():
    predicted = Predictions(torch.zeros(1, 4))
    for broken in (torch.full((1, 4), torch.nan), torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]])):
        found = Agreement(2)
        found.add(0, predicted, Predictions(broken), torch.tensor([1]))
        assert not found.finite
    assert perplexity(1e4) == math.inf
