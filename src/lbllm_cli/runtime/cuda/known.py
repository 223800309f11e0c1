"""What the kernels of a decode step were told, and whether it still holds: asked at every step, of the whole model at once."""

from itertools import chain
from operator import is_
from weakref import ref

from torch import Tensor

from lbllm_cli.runtime.kv_cache import RecordLayer
from lbllm_cli.runtime.quantizer import ActQuantizer


class Known:
    """tensors: what is read where it lies, None for what is not there. numbers: what kernels were given. quantizers: whose tables
    were read once: a change of a buffer in place is counted by torch, but for one through `.data`.
    """

    def __init__(self, tensors: list[Tensor | None], numbers: list[float], quantizers: list[ActQuantizer]):
        self.tensors, self.numbers = tensors, numbers
        self.addresses = _addresses(tensors)
        self.quantizers = quantizers
        self.sizes = [quantizer.size for quantizer in quantizers]
        self.buffers = self._buffers()
        # A tensor of inference mode counts no changes, and refuses changes outside of it.
        self.counted = [tensor for tensor in self.buffers if tensor is not None and not tensor.is_inference()]
        self.versions = [tensor._version for tensor in self.counted]

    def _buffers(self) -> list[Tensor | None]:
        return list(chain.from_iterable([quantizer._buffers.values() for quantizer in self.quantizers]))

    def holds(self, tensors: list[Tensor | None], numbers: list[float]) -> bool:
        """Whether nothing has changed; tensors and numbers: as they are now."""
        return (
            all(map(is_, tensors, self.tensors))
            and _addresses(tensors) == self.addresses
            and numbers == self.numbers
            and all(map(is_, self._buffers(), self.buffers))
            and [tensor._version for tensor in self.counted] == self.versions
            and [quantizer.size for quantizer in self.quantizers] == self.sizes
        )


def _addresses(tensors: list[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


class Held:
    """What a cache's layers held after a step: the next one need not look into what is the same. It keeps nothing alive."""

    def __init__(self, layers: list[RecordLayer]):
        self._parts = [ref(part) for part in _parts(layers)]

    def still(self, layers: list[RecordLayer]) -> bool:
        """Whether as many layers hold the very same tensors."""
        return all(kept() is part for kept, part in zip(self._parts, _parts(layers), strict=True))


def _parts(layers: list[RecordLayer]) -> list[Tensor]:
    return [part for layer in layers for part in (layer.keys, layer.values)]
