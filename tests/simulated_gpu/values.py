"""Tensors without values: of more than a few elements a tensor has a shape alone, and what is worked out of it is made up.

A sum, a norm or a flag of such a tensor is 1.0, 0 or True, but False of `any`: finite, and no error found. From there on it is
worked with like any other, so that what a program decides by it hangs together.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from simulated_gpu.nested import mapped, mapped_values, tensors_of
from torch import Tensor
from torch._ops import OpOverload

# Elements up to which tensors keep values: tables, indices and sums are worked out.
SMALL = 8192
_MAKING = ("aten.empty", "aten.full", "aten.arange", "aten.eye", "aten.new_", "aten.linspace", "aten.randperm", "aten.tri")
_SIZES = ("aten.nonzero", "aten.masked_select", "aten.index", "aten._unsafe_index")


def made_up(dtype: torch.dtype, origin: str) -> float | int | bool:
    """What is read from a tensor without values. origin: the operator that it came from."""
    if dtype == torch.bool:
        return origin != "aten.any"
    return 1.0 if dtype.is_floating_point else 0


def number(inner: Tensor) -> Any:
    """The value of a tensor of one element."""
    return made_up(inner.dtype, "") if inner.is_meta else inner.item()


def same(one: Tensor, other: Tensor) -> bool:
    """`torch.equal`; False where values are not known: loops that end on it run as long as they may."""
    return not (one.is_meta or other.is_meta) and torch.equal(one, other)


def fill(to: Tensor, origin: str) -> None:
    """Puts made-up values into memory with values."""
    if not to.is_meta:
        to.detach().fill_(made_up(to.dtype, origin))


def shrunk(inner: Tensor) -> Tensor:
    """Without values where it is large, as long as it is nobody's view."""
    return inner.to("meta") if inner.numel() > SMALL and not inner.is_meta and not _repeats(inner) else inner


def _repeats(inner: Tensor) -> bool:
    return any(stride == 0 and extent > 1 for extent, stride in zip(inner.shape, inner.stride(), strict=True))


def run_without(function: OpOverload, name: str, args: Any, kwargs: dict[str, Any], written: list[Tensor]) -> Any:
    """An operator on tensors of which some have no values; see `device.Device`."""
    leaves = tensors_of(args, kwargs)
    if name.startswith("lbllm."):
        for out in written:
            fill(out, name)
        return None
    if not any(x.is_meta for x in leaves):
        if kwargs.get("device") is not None or name.startswith(_MAKING):
            shapes = function(*mapped(without, args), **_without_device(kwargs))
            if math.prod(shapes.shape) > SMALL:
                return shapes
        found = function(*args, **kwargs)
        own = {x.untyped_storage()._cdata for x in leaves}
        return _each(lambda x: x if x.untyped_storage()._cdata in own else shrunk(x), found)
    if name in _SIZES and (made := _sized(name, args)) is not None:
        return made
    bare = {id(x): without(x) for x in leaves}

    def replaced(x: Tensor) -> Tensor:
        return bare[id(x)]

    found = function(*mapped(replaced, args), **_without_device(mapped_values(replaced, kwargs)))
    for out in written:
        fill(out, name)
    back = {id(bare[id(x)]): x for x in written}
    own = {x.untyped_storage()._cdata for x in bare.values()}

    def result(x: Tensor) -> Tensor:
        if id(x) in back:
            return back[id(x)]
        small = x.numel() <= SMALL and x.untyped_storage()._cdata not in own
        return torch.full(x.shape, made_up(x.dtype, name), dtype=x.dtype) if small else x

    return _each(result, found)


def _each(change: Callable[[Tensor], Tensor], found: Any) -> Any:
    """An operator's results, changed."""
    return mapped(change, found) if isinstance(found, list | tuple) else change(found) if isinstance(found, Tensor) else found


def without(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same form that has no values."""
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device="meta")


def _without_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    own = dict(kwargs)
    if own.get("device") is not None:
        own["device"] = torch.device("meta")
    # One of the CPU's is refused there.
    own.pop("generator", None)
    return own


def _sized(name: str, args: Any) -> Tensor | None:
    """What a mask picks out: everything, where nobody knows better."""
    source = args[0]
    if name == "aten.nonzero":
        return torch.empty(source.numel(), source.dim(), dtype=torch.int64, device="meta")
    if name == "aten.masked_select":
        return torch.empty(source.numel(), dtype=source.dtype, device="meta")
    masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
    if len(masks) != 1 or len(args[1]) != 1:
        return None
    return torch.empty(masks[0].numel(), *source.shape[masks[0].dim() :], dtype=source.dtype, device="meta")
