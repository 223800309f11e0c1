"""An input that several linears read, which carries along what the first of them has worked out for all.

What was found lies in the tensor that is handed over, for as long as it is handed over: not in a memo that finds it again by
the identity of a tensor, which somebody may have changed in place since, or another thread looked up in between.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")

# Reading a tensor's form leaves its values alone, and hands out nothing by which they could be changed.
_FORM = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "is_floating_point", "__len__", "__hash__")),
}


class SharedInput(Tensor):
    """`plain` as a module's linears get it. found: by reader, what it has worked out; None once there is nothing to share.

    Whatever is done with it but reading its form is done with the tensor itself, and ends the sharing: a view, a wrapper that
    scales it, a hook that changes it in place. So does a change in place of the tensor that it stands for.
    """

    plain: Tensor
    found: dict[Any, Any] | None
    version: int

    @staticmethod
    def of(x: Tensor) -> Tensor:
        """x float [..., width], shared; as it is where its changes are not counted (inference mode)."""
        if x.is_inference() or type(x) is SharedInput:
            return x
        shared = x.as_subclass(SharedInput)
        shared.plain, shared.found, shared.version = x, {}, x._version
        return shared

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _FORM:
            for x in (*args, *(kwargs or {}).values()):
                for shared in x if isinstance(x, list | tuple) else (x,):
                    if type(shared) is SharedInput:
                        shared.found = None
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def unchanged(self) -> dict[Any, Any] | None:
        """`found`, while it belongs to the present values."""
        if self.found is not None and self.plain._version != self.version:
            self.found = None
        return self.found


def plain(x: Tensor) -> Tensor:
    """x itself, where it is shared the tensor that it stands for."""
    return x.plain if type(x) is SharedInput else x


def once(x: Tensor, reader: object, work: Callable[[Tensor], Found]) -> Found:
    """`work(x)`; of a shared input, what `reader` has found before."""
    found = x.unchanged() if type(x) is SharedInput else None
    if found is None:
        return work(plain(x))
    if reader not in found:
        found[reader] = work(plain(x))
    known: Found = found[reader]
    return known
