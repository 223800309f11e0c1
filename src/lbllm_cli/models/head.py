"""Language-model head: last hidden states after the norm to logits."""

from torch import Tensor, nn
from torch.nn.functional import linear


class Head(nn.Module):
    """The head's matrix, and what a family does with its products.

    weight: [vocab, hidden]. divisor: of products. cap: c where products z become c tanh(z / c), None for none.
    Hidden states [..., hidden] -> logits [..., vocab], in the dtype of both.
    """

    def __init__(self, weight: Tensor, divisor: float = 1.0, cap: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.divisor, self.cap = divisor, cap

    def forward(self, hidden: Tensor) -> Tensor:
        return self.finished(linear(hidden, self.weight))

    def finished(self, products: Tensor) -> Tensor:
        """Logits of products, in place."""
        if self.divisor != 1:
            products.div_(self.divisor)
        if self.cap is not None:
            products.div_(self.cap).tanh_().mul_(self.cap)
        return products

    def chained(self, slope: Tensor, logits: Tensor) -> Tensor:
        """The slope of something by logits, in place to that by products."""
        if self.cap is not None:
            # d (c tanh(z / c)) / dz = 1 - tanh^2
            slope.mul_(1 - (logits / self.cap).square())
        return slope.div_(self.divisor) if self.divisor != 1 else slope
