"""Gradients on their way between ranks.

Two kinds. The gradient of a block's weight goes to the rank that owns the linear's masters, while the backward pass goes on: only
there is a step taken, and before the next one the weight is spread again. What every rank has a copy of, quantizers, norms and
levels of fixed codes, is summed up everywhere after the backward pass, in a few large pieces.
"""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lbllm_cli.parallel.group import Group, Pending
from lbllm_cli.training.interfaces import Trained

# Bytes of gradients that are summed in one operation.
_BUCKET = 16 << 20


class Exchange:
    """Of one training. A process by itself has nothing to exchange: every call is a no-op then."""

    def __init__(self, trained: Trained, group: Group):
        self.trained, self.group, self.node = trained, group, group.node
        several = group.size > 1
        # On the way back the last linear is first.
        self.weights = list(reversed(trained.spread_weights())) if several else []
        self.copies = trained.copies() if several else []
        self._sent: list[tuple[Tensor, Pending]] = []
        self._absent: list[bool] = []
        self._armed = False
        self._whole: set[int] = set()
        for weight, _ in self.weights:
            weight.register_post_accumulate_grad_hook(_hook(self))

    def last(self) -> None:
        """The micro-batch that comes is the step's last: what it makes of gradients is whole."""
        self._armed = bool(self.weights)

    def _ready(self, weight: Tensor) -> None:
        """Sends off what is whole, in one order on all ranks. A gradient that is there may be of micro-batches before alone."""
        if not self._armed:
            return
        self._whole.add(id(weight))
        while len(self._sent) < len(self.weights) and id(self.weights[len(self._sent)][0]) in self._whole:
            self._send(absent=False)

    def _send(self, absent: bool) -> None:
        weight, owner = self.weights[len(self._sent)]
        if absent:
            weight.grad = torch.zeros_like(weight)
        assert weight.grad is not None
        self._absent.append(absent)
        self._sent.append((weight.grad, self.node.begin_reduce(weight.grad, owner)))

    def weights_done(self) -> None:
        """After the backward passes: owners have the gradients of their weights, nobody has those of others' weights."""
        self._armed = False
        self._whole.clear()
        while len(self._sent) < len(self.weights):
            # Of an expert that no token of this rank was sent to, or of a rank that had no sequence in the step.
            self._send(absent=self.weights[len(self._sent)][0].grad is None)
        if not self.weights:
            return
        used = self.group.some([not absent for absent in self._absent])
        for (weight, owner), (_, pending), needed in zip(self.weights, self._sent, used, strict=True):
            pending.wait()
            if not needed or owner != self.node.rank:
                weight.grad = None
        self._sent, self._absent = [], []

    def copies_done(self) -> None:
        """After gradients were carried to the masters: every rank has the sums of those of which all have copies."""
        if not self.copies:
            return
        # Asked of the host: to look at numbers of a device is to wait for it.
        used = dict(zip(self.copies, self.group.some([p.grad is not None for p in self.copies]), strict=True))
        for bucket in _buckets(self.copies):
            flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in bucket])
            self.group.add(flat)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p) if used[p] else None


def _hook(exchange: Exchange) -> Callable[[Tensor], None]:
    # Bound, it would hold the exchange, and with it the weight that holds the hook: a cycle through torch that Python's collector
    # does not see. Every finished block of a run would have stayed on the device, 2.3 GB each of a 70B on 8 ranks.
    reference = weakref.ref(exchange)

    def ready(weight: Tensor) -> None:
        if (found := reference()) is not None:
            found._ready(weight)

    return ready


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Parameters in groups of one dtype and at most `_BUCKET` bytes, in their order."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size + parameter.nbytes > _BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket
