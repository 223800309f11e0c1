"""The running mean of what is trained: the last steps in one state, without what each of them alone added by chance."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# So that in a short training, too, the start counts for little.
_FIRST, _SPAN = 1, 10


class RunningMean:
    """Exponential moving average of parameters, in their dtype and on their device.

    parameters: in training. decay: share of the mean that a step leaves; in the first steps less, (1 + n) / (10 + n) in step n.
    means: by parameter. One number 0.0 that steps move to 1.0, 2.0 and 3.0, decay 0.97: 0.82, 1.70 and 2.60.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.decay = decay
        self.means: dict[nn.Parameter, Tensor] = {parameter: parameter.detach().clone() for parameter in parameters}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """After a step. step: its number, from 1."""
        left = min(self.decay, (_FIRST + step) / (_SPAN + step))
        if self.means:
            torch._foreach_lerp_(list(self.means.values()), [parameter.detach() for parameter in self.means], 1 - left)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While it is open parameters have the mean's values; then their own again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # In place, one after the other: kernels keep where a parameter lies, and one copy at a time is all that is needed.
        for parameter, mean in self.means.items():
            own = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(own)
