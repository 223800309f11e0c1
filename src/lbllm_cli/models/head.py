"""Language-model head: last hidden states after the norm to logits."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.functional import linear

# Logits that exist at once where they are not whole in memory. A loss with its gradient keeps four tensors of them in float32, 34
# MB each. With 49,152 tokens in the vocabulary twice as many were 10 % slower on a CPU, and half as many 6 %.
LOGITS = 1 << 23


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

    def pieces(self, positions: int) -> Iterator[slice]:
        """Of so many positions that one has `LOGITS` logits."""
        size = max(1, LOGITS // self.weight.shape[0])
        return (slice(start, min(start + size, positions)) for start in range(0, positions, size))

    def exact(self, hidden: Tensor) -> Tensor:
        """Logits in float32; what follows the products is computed in it as well."""
        return self.finished(linear(hidden, self.weight).float())

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
