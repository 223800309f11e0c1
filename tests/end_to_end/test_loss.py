"""The loss on next-token distributions against autograd in float64, whatever is cut where."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear, log_softmax

from lbllm_cli.end_to_end import loss as distillation
from lbllm_cli.end_to_end.loss import distillation_loss
from lbllm_cli.models.head import Head
from lbllm_cli.training.ste import rounded

POSITIONS, HIDDEN, VOCAB = 13, 8, 37


# As most families have it; Granite divides logits, Gemma 2 caps them.
HEADS = {"plain": (1.0, None), "divided": (6.0, None), "capped": (1.0, 3.0), "both": (0.7, 2.0)}


@pytest.fixture(params=["plain"])
def given(request):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(POSITIONS, HIDDEN, generator=generator) for _ in range(2))
    head = Head(torch.randn(VOCAB, HIDDEN, generator=generator), *HEADS[request.param])
    return student, teacher, head, torch.randint(VOCAB, (POSITIONS,), generator=generator)


def reference(student, teacher, head, wanted, temperature, share):
    """As the definition has it, in float64, and its gradient."""
    student = student.double().requires_grad_()
    logits, aims = (linear(x, head.weight.double()) / head.divisor for x in (student, teacher.double()))
    if head.cap is not None:
        logits, aims = (head.cap * torch.tanh(x / head.cap) for x in (logits, aims))
    found, aim = (log_softmax(x / temperature, -1) for x in (logits, aims))
    divergence = (aim.exp() * (aim - found)).sum(-1).mean()
    loss = (1 - share) * temperature**2 * divergence + share * cross_entropy(logits, wanted)
    loss.backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize("given", HEADS, indirect=True)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("at_once", [1, VOCAB, 5 * VOCAB, 1 << 24])
def test_loss_and_gradient(given, monkeypatch, temperature, share, at_once):
    monkeypatch.setattr(distillation, "LOGITS", at_once)
    student = given[0].clone().requires_grad_()
    loss = distillation_loss(student, *given[1:], temperature, share)
    (3 * loss).backward()
    expected, grad = reference(*given, temperature, share)
    # Measured 2e-7, with divided logits, whose divergence is small, 2e-6; and 4e-7 of the largest.
    assert loss.item() == pytest.approx(expected.item(), rel=5e-6)
    assert (student.grad.double() - 3 * grad).abs().max() <= 2e-6 * grad.abs().max() * 3


def test_the_teacher_itself_has_no_divergence_and_no_gradient(given):
    _, teacher, head, wanted = given
    student = teacher.clone().requires_grad_()
    loss = distillation_loss(student, teacher, head, wanted, 1.0, 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


def test_without_gradients_none_is_worked_out(given):
    with torch.no_grad():
        loss = distillation_loss(*given, 1.0, 0.5)
    assert loss.item() == pytest.approx(reference(*given, 1.0, 0.5)[0].item(), rel=1e-6)
    assert not loss.requires_grad


def test_half_precision_states(given):
    student, teacher, head = (part.bfloat16() for part in given[:3])
    student.requires_grad_()
    loss = distillation_loss(student, teacher, head, given[3], 1.0, 0.0)
    loss.backward()
    expected, grad = reference(student.detach(), teacher, head, given[3], 1.0, 0.0)
    # Logits are rounded to bfloat16: measured 4e-3 and 8e-3.
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert (student.grad.double() - grad).abs().max() <= 0.03 * grad.abs().max()


def test_rounded_gives_stored_values_and_passes_gradients():
    master = torch.tensor([1.0 + 2**-12, -3.3], requires_grad=True)
    found = rounded(master, torch.bfloat16)
    assert torch.equal(found, master.detach().bfloat16().float())
    found.backward(torch.tensor([2.0, 5.0]))
    assert torch.equal(master.grad, torch.tensor([2.0, 5.0]))
