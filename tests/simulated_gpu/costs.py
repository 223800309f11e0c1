"""What one call of an operator costs on a device: kernels, bytes read and written, FLOP."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from simulated_gpu.accounting import kind_of, touched
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

# Kernels of one call in torch's eager mode, where it is not one: roughly.
_LAUNCHES = {
    "aten.sort": 4, "aten.cumsum": 2, "aten.median": 5, "aten.index": 2, "aten.linalg_vector_norm": 2, "aten.topk": 3,
    "aten.linalg_cholesky_ex": 40, "aten.cholesky_solve": 10, "aten.cholesky_inverse": 40, "aten.linalg_solve_triangular": 4,
}  # fmt: skip
# Memory that is handed out, and other names for memory that is there.
_FREE = {
    "aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided", "aten.new_empty_strided", "aten._unsafe_view",
    "aten.lift_fresh", "aten.is_pinned", "aten.is_same_size",
}  # fmt: skip
# What they read of the first argument is as much as they give.
_PICKED = {"aten.gather", "aten.index", "aten.index_select", "aten.embedding", "aten.slice_backward", "aten.select_backward"}
# Values that are there already are not read.
_OVERWRITTEN = {f"aten.{name}" for name in ("zero_", "fill_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_full")}

Named = dict[str, Any]


class Cost(NamedTuple):
    """Of one call. read, written: bytes. work: FLOP by kind."""

    kernels: int
    read: float
    written: float
    work: dict[str, float]


def _packed(named: Named) -> float:
    """Of a product with packed weights: words int32 [out, groups, words], 16 codes each."""
    return 2.0 * len(named["out"]) * int(named["words"].numel()) * 16


def _columns(weights: str) -> Callable[[Named], float]:
    """Of columns [size, rows] in turn, each of which changes all of its group."""
    return lambda named: 2.0 * named[weights].numel() * len(named[weights])


def _gram(named: Named) -> float:
    """Half of H, as three 16-bit numbers, with four levels of every row."""
    rows, width = named["ranks"].shape
    return 2.0 * 3 * 4 * rows * width * width / 2


# FLOP of the package's own operators, by name: kind, and how many by named arguments. What is not here counts its bytes alone.
PRODUCT: dict[str, tuple[str, Callable[[Named], float]]] = {
    "gemv_places": ("int8", _packed),
    "gemm_places": ("int8", _packed),
    "gemv_values": ("bf16", _packed),
    "gemm_values": ("bf16", _packed),
    "head_logits": ("bf16", lambda named: 2.0 * len(named["x"]) * named["weight"].numel()),
    "attend_records": ("bf16", lambda named: 4.0 * named["query"].numel() * named["keys"].shape[2]),
    "add_squares": ("bf16", lambda named: 1.0 * named["x"].numel() * named["x"].shape[1]),
    "add_drift": ("bf16", lambda named: 2.0 * named["x"].numel() * named["x"].shape[1]),
    "gram_of_levels": ("bf16", _gram),
    "compensate_columns": ("fp32", _columns("block")),
    "descend_columns": ("fp32", _columns("gradient")),
}
# What they change they read as well.
_UPDATED = {"add_squares", "add_drift", "latent_step", "sort_levels"}


def _square(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.shape[-1])


# FLOP of operators that torch's own table leaves out, by positional arguments.
_OTHER: dict[str, Callable[..., float]] = {
    "aten.linalg_cholesky_ex": lambda a, *_: _square(a) / 3,
    "aten.cholesky_inverse": lambda a, *_: _square(a) * 2 / 3,
    "aten.cholesky_solve": lambda b, a, *_: 2.0 * math.prod(a.shape) * b.shape[-1],
    "aten.addmm_": lambda _, a, b: 2.0 * a.numel() * b.shape[-1],
    "aten.addr_": lambda a, *_: 2.0 * a.numel(),
    "aten.addr": lambda a, *_: 2.0 * a.numel(),
}


def is_view(function: OpOverload) -> bool:
    """Whether an operator's results are other names for its arguments' memory."""
    return any(result.alias_info is not None and not result.alias_info.is_write for result in function._schema.returns)


def is_free(function: OpOverload, name: str) -> bool:
    """Whether an operator does nothing on the device."""
    return name in _FREE or is_view(function)


def cost_of(
    function: OpOverload, name: str, args: Sequence[Any], named: Named, inputs: list[Tensor], outputs: list[Tensor]
) -> Cost:
    """Of one call. args, named, inputs, outputs: with tensors as they are inside; inputs: read, outputs: written."""
    if name.startswith("lbllm."):
        return _of_product(name.removeprefix("lbllm."), named, inputs, outputs)
    written = float(sum(out.numel() * out.element_size() for out in outputs))
    distinct = {id(tensor): tensor for tensor in inputs}.values()
    read = float(sum(map(touched, distinct)))
    if name in _PICKED:
        read = min(read, written + sum(map(touched, list(distinct)[1:])))
    if name in _OVERWRITTEN:
        read = 0.0
    kind = kind_of(inputs[0].dtype if inputs else torch.float32)
    if name in _OTHER:
        flop = _OTHER[name](*args)
    elif (formula := flop_registry.get(function.overloadpacket)) is not None:
        flop = float(formula(*args, out_val=outputs[0] if len(outputs) == 1 else outputs))
    else:
        flop = 0.0
    return Cost(_LAUNCHES.get(name, 1), read, written, {kind: flop} if flop else {})


def _of_product(name: str, named: Named, inputs: list[Tensor], outputs: list[Tensor]) -> Cost:
    """One kernel that reads what it is given and writes what it changes, each once."""
    changed = set() if name in _UPDATED else {id(tensor) for tensor in outputs}
    read = sum(touched(tensor) for tensor in {id(x): x for x in inputs}.values() if id(tensor) not in changed)
    kind, flop = PRODUCT.get(name, ("fp32", lambda _: 0.0))
    work = float(flop(named))
    return Cost(1, float(read), float(sum(map(touched, outputs))), {kind: work} if work else {})
