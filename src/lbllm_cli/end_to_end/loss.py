"""Distance of a student's next-token distributions from the teacher's, a few positions at a time.

Logits of a batch are never whole in memory: those of a Llama 3 batch of 4,096 tokens would be 2.1 GB in float32, and the loss
needs several tensors of their size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear

from lbllm_cli.models.head import Head

# Logits that exist at once, of which a loss with its gradient keeps four tensors in float32: 34 MB each. With 49,152 tokens in
# the vocabulary twice as many were 10 % slower on a CPU, and half as many 6 %.
LOGITS = 1 << 23


def _pieces(positions: int, vocab: int) -> Iterator[slice]:
    size = max(1, LOGITS // vocab)
    return (slice(start, min(start + size, positions)) for start in range(0, positions, size))


def _logits(states: Tensor, head: Head) -> Tensor:
    """Logits of some states, in float32; what follows the products is computed in it as well."""
    return head.finished(linear(states, head.weight).float())


def _log_softmax_(logits: Tensor) -> Tensor:
    """In place."""
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


class DistillationLoss(Function):
    """Mean over positions of (1 - share) * T^2 * KL(teacher || student) + share * -log p_student(next token), in nats.

    student, teacher: last hidden states after the norm [n, hidden]. head: of [vocab, hidden]. wanted: next tokens int64 [n].
    temperature: T, of both distributions in the divergence. share: of the next-token loss. Returns a float32 scalar;
    differentiable in student alone. (1022, 576), (1022, 576), (49152, 576), (1022,) -> ().
    The gradient is worked out with the loss, while the logits are there. It is exact: T (q - p) of the logits for the
    divergence, softmax - one hot for the next token.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, head: Head, wanted: Tensor, temperature: float, share: float
    ) -> Tensor:
        count = len(student)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for piece in _pieces(count, head.weight.shape[0]):
            logits = _logits(student[piece], head)
            # Both distributions are worked out in place.
            kept = logits.clone() if head.cap is not None and grad is not None else logits
            slope: Tensor | None = None
            if share:
                own = _log_softmax_(logits.clone() if share < 1 else logits)
                total -= share * own.gather(-1, wanted[piece].unsqueeze(-1)).sum(dtype=torch.float64)
                slope = own.exp_()
                slope.scatter_add_(-1, wanted[piece].unsqueeze(-1), slope.new_full((1, 1), -1.0).expand(len(slope), 1))
                slope.mul_(share)
            if share < 1:
                found = _log_softmax_(logits.div_(temperature))
                aim = _log_softmax_(_logits(teacher[piece], head).div_(temperature))
                chance = aim.exp()
                total += (1 - share) * temperature**2 * (aim.sub_(found).mul_(chance)).sum(dtype=torch.float64)
                nearer = found.exp_().sub_(chance).mul_((1 - share) * temperature)
                slope = nearer if slope is None else slope.add_(nearer)
            if grad is not None and slope is not None:
                slope = head.chained(slope, kept)
                grad[piece] = (slope.to(head.weight.dtype) @ head.weight).to(grad.dtype).div_(count)
        ctx.save_for_backward(grad)
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None, None, None


distillation_loss: Callable[[Tensor, Tensor, Head, Tensor, float, float], Tensor] = DistillationLoss.apply
