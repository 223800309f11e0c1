"""Hostile inputs of the wrappers one by one: units, the head, the quantizer and its gradients. Each as `case(native)`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lbllm_cli.format.activations import Quantized, Tables
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.cpu import quantizer as wrapper
from lbllm_cli.runtime.cpu.head import HeadLinear
from lbllm_cli.runtime.torch.quantizer import gradients

Part = Callable[[bool], Any]
INF = float("inf")


def _odd_values(width: int) -> dict[str, Tensor]:
    """Inputs [rows, width] that numbers, layouts or dtypes make odd."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, width, generator=generator)
    spoiled = {f"one_{name}": x.clone() for name in ("nan", "inf", "minus_inf", "huge", "tiny")}
    for tensor, value in zip(spoiled.values(), (float("nan"), INF, -INF, 3e38, 1e-44), strict=True):
        tensor[1, 3] = value
    return {
        **spoiled,
        "nan": x * float("nan"),
        "infinity": torch.full_like(x, INF),
        "both_infinities": torch.full_like(x, INF) * x.sign(),
        "zeros": x * 0,
        "denormals": x * 1e-43,
        "largest": torch.full_like(x, 3.4028234e38) * x.sign(),
        "no_rows": x[:0],
        "transposed": x.t().contiguous().t(),
        "every_second": torch.stack([x, x * 0], -1).flatten(-2)[..., ::2],
        "expanded": x[:1].expand_as(x),
        "of_one_number": x[:1, :1].expand_as(x),
        "backwards": x.flip(0),
        "halves": x.half(),
        "bfloat16": x.bfloat16(),
        "doubles": x.double(),
        "integers": x.round().long(),
        "bytes": x.abs().byte(),
        "booleans": x > 0,
        "complex": torch.complex(x, x),
        "one_dimension": x[0],
        "five_dimensions": x[None, None, None],
        "many": x.repeat(700, 1),
        "of_a_view": torch.cat([x, x], 1)[:, :width],
    }


def _of_widths(width: int) -> dict[str, Tensor]:
    x = torch.randn(5, width)
    return {"too_narrow": x[:, :-1], "too_wide": torch.cat([x, x], 1), "no_width": x[:, :0], "number": torch.tensor(1.0)}


def _unit(unit: Any, x: Tensor, slot: int) -> Part:
    """A unit's output through the library; in torch, from its canonical tensors."""

    def go(native: bool) -> Any:
        if native:
            return unit.output(slot, x).float()
        weight, bias = unit.packed(slot).values().to(x.dtype), unit.linears[slot].bias
        quantized = x if unit.quantizer is None else unit.quantizer(x)
        return linear(quantized, weight, None if bias is None else bias.to(x.dtype)).float()

    return go


def _head(x: Tensor, change: Callable[[Any], None] | None = None) -> Part:
    def go(native: bool) -> Any:
        torch.manual_seed(3)
        head = torch.nn.Linear(48, 96, bias=False, dtype=torch.bfloat16)
        if change is not None:
            change(head)
        if native:
            head.__class__ = HeadLinear
            return head(x).float()
        # Inputs may be of another dtype than the weights, which torch does not multiply.
        return torch.nn.functional.linear(x.to(head.weight.dtype).float(), head.weight.float())

    return go


def _without_library(native: bool, work: Callable[[], Any]) -> Any:
    known = wrapper.library
    wrapper.library = known if native else lambda: None
    try:
        return work()
    finally:
        wrapper.library = known


def tables(size: int = 16, count: int = 2) -> Tables:
    """Two static tables of `size` levels."""
    levels = torch.stack([torch.arange(size), torch.arange(size) * 3]).to(torch.uint8)[:count]
    return Tables(levels, torch.tensor([min(5, size - 1), 3 * min(9, size - 1)], dtype=torch.uint8)[:count], torch.ones(count, 2))


def _quantized(x: Tensor, by: Tables, step_dtype: torch.dtype = torch.float32) -> Part:
    return lambda native: _without_library(native, lambda: backend_of(x.device).quantized(x, by, step_dtype).values)


def _gradients(change: Callable[[dict[str, Any]], None], inputs: bool = True, sums: bool = True) -> Part:
    """What the library, or torch, makes of a gradient, one of its arguments changed."""

    def go(native: bool) -> Any:
        generator = torch.Generator().manual_seed(2)
        x, gradient = (torch.randn(4, 9, 16, generator=generator) for _ in range(2))
        found = _without_library(False, lambda: backend_of(x.device).quantized(x, tables(), torch.float32))
        given = {"x": x, "gradient": gradient, **found._asdict()}
        change(given)
        parts = Quantized(*(given[name] for name in found._fields))
        function = wrapper.native_gradients if native else gradients
        answers = function(given["x"], tables(), parts, given["gradient"], (inputs, sums))
        return torch.cat([answer.flatten() for answer in answers if answer is not None])

    return go


def _set(**changes: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], None]:
    def go(given: dict[str, Any]) -> None:
        given.update({name: change(given[name]) for name, change in changes.items()})

    return go


def cases(model: Any) -> dict[str, Part]:
    """All cases by name. model: through the kernels."""
    units = {name: model.get_submodule(f"model.layers.0.{name}").unit for name in ("self_attn.q_proj", "mlp.down_proj")}
    found: dict[str, Part] = {}
    for place, unit in units.items():
        odd = {**_odd_values(unit.in_features), **_of_widths(unit.in_features)}
        found |= {f"unit {place} {name}": _unit(unit, x, 0) for name, x in odd.items()}
    unit = units["self_attn.q_proj"]
    found["unit slot beyond"] = _unit(unit, torch.randn(2, unit.in_features), 7)
    found["unit unpack beyond"] = lambda native: unit.packed(3).codes.float()
    found |= {f"head {name}": _head(x[:3]) for name, x in {**_odd_values(48), **_of_widths(48)}.items() if x.dim()}
    found |= {
        "head weight shorter": _head(torch.randn(2, 48), lambda head: _weight(head, head.weight[:5].clone())),
        "head weight narrower": _head(torch.randn(2, 48), lambda head: _weight(head, head.weight[:, :5].clone())),
        "head weight empty": _head(torch.randn(2, 48), lambda head: _weight(head, head.weight[:0].clone())),
        "head weight larger": _head(torch.randn(2, 48), lambda head: _weight(head, head.weight.repeat(3, 1))),
        "head weight transposed": _head(torch.randn(2, 48), lambda head: _weight(head, head.weight.t().contiguous().t())),
        "head weight expanded": _head(torch.randn(2, 48), lambda head: _weight(head, head.weight[:1].expand(96, -1))),
        "head weight of three dimensions": _head(torch.randn(2, 48), lambda head: _weight(head, head.weight[None].clone())),
        "head features changed": _head(torch.randn(2, 48), lambda head: setattr(head, "out_features", 10**6)),
    }
    # Groups [..., size]: of a single one, and of no group, torch makes nothing.
    for name, x in {**_odd_values(16), **_of_widths(16)}.items():
        if x.dim() > 1:
            found[f"quantizer {name}"] = _quantized(x, tables())
    x = torch.randn(3, 5, 16)
    uniform = Tables(torch.arange(16, dtype=torch.uint8).unsqueeze(0), None, torch.ones(1, 2))
    found |= {
        "quantizer uniform": _quantized(x, uniform),
        "quantizer uniform nan": _quantized(x * float("nan"), uniform),
        "quantizer uniform infinity": _quantized(x / 0, uniform),
        "quantizer of halves": _quantized(x, tables(), torch.float16),
        "quantizer of long groups": _quantized(torch.randn(3, 5000), tables()),
        "quantizer of one value": _quantized(torch.randn(3, 1), tables()),
        "quantizer of one level": _quantized(x, tables(1)),
        "quantizer of large levels": _quantized(x, tables(16)._replace(levels=tables(16).levels + 120)),
        "quantizer of 256 levels": _quantized(x, uniform._replace(levels=torch.arange(256).to(torch.uint8).unsqueeze(0))),
        "quantizer descending": _quantized(x, tables()._replace(levels=tables().levels.flip(1))),
        "quantizer of a foreign zero": _quantized(x, tables()._replace(zero=torch.tensor([200, 201], dtype=torch.uint8))),
        "quantizer of one zero": _quantized(x, tables()._replace(zero=torch.tensor([3], dtype=torch.uint8))),
        "quantizer of three zeros": _quantized(x, tables()._replace(zero=torch.tensor([3, 3, 3], dtype=torch.uint8))),
        "quantizer of short clips": _quantized(x, tables()._replace(clip=torch.ones(1, 2))),
        "quantizer of clips of nan": _quantized(x, tables()._replace(clip=torch.full((2, 2), float("nan")))),
        "quantizer of clips of nothing": _quantized(x, tables()._replace(clip=torch.zeros(2, 2))),
        "quantizer of negative clips": _quantized(x, tables()._replace(clip=-torch.ones(2, 2))),
        "quantizer of three tables": _quantized(x, tables()._replace(levels=tables().levels[[0, 1, 1]])),
        "quantizer of no tables": _quantized(x, tables()._replace(levels=tables().levels[:0])),
    }
    found |= {
        "gradients as they should be": _gradients(lambda given: None),
        "gradients for nothing": _gradients(lambda given: None, True, False),
        "gradients of fewer rows": _gradients(_set(gradient=lambda t: t[:1])),
        "gradients too narrow": _gradients(_set(gradient=lambda t: t[..., :3])),
        "gradients of one number": _gradients(_set(gradient=lambda t: t[0, 0, 0])),
        "gradients expanded": _gradients(_set(gradient=lambda t: t[:1].expand_as(t))),
        "gradients transposed": _gradients(_set(gradient=lambda t: t.transpose(0, 2).contiguous().transpose(0, 2))),
        "gradients of doubles": _gradients(_set(gradient=lambda t: t.double())),
        "gradients of nan": _gradients(_set(gradient=lambda t: t * float("nan"))),
        "gradients empty": _gradients(_set(gradient=lambda t: t[:0])),
        "gradients x narrower": _gradients(_set(x=lambda t: t[..., :8])),
        "gradients x of more rows": _gradients(_set(x=lambda t: torch.cat([t, t]))),
        "gradients x of nan": _gradients(_set(x=lambda t: t * float("nan"))),
        "gradients values shorter": _gradients(_set(values=lambda t: t[:1])),
        "gradients values not contiguous": _gradients(_set(values=lambda t: t.transpose(0, 1).contiguous().transpose(0, 1))),
        "gradients steps shorter": _gradients(_set(step=lambda t: t[:1])),
        "gradients steps not contiguous": _gradients(_set(step=lambda t: t.t().contiguous().t())),
        "gradients steps of zero": _gradients(_set(step=lambda t: t * 0)),
        "gradients steps of nan": _gradients(_set(step=lambda t: t * float("nan"))),
        "gradients tables beyond": _gradients(_set(table=lambda t: t + 1000)),
        "gradients tables below zero": _gradients(_set(table=lambda t: t - 5)),
        "gradients tables shorter": _gradients(_set(table=lambda t: t[:1])),
        "gradients zeros shorter": _gradients(_set(zero=lambda t: t[:1])),
        "gradients zeros of floats": _gradients(_set(zero=lambda t: t.float())),
        "gradients zeros not contiguous": _gradients(_set(zero=lambda t: t.t().contiguous().t())),
    }
    return found


def _weight(head: Any, weight: Tensor) -> None:
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
