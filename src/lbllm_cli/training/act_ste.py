"""Gradients of the activation quantizer: a straight-through estimator of the deployed form, and the soft form for its knees.

A surrogate says what the backward pass differentiates; codes, tables taken and the extremes of a group are constants in it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lbllm_cli.format.activations import Quantized, Tables, extremes
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.stage_kernels import StageKernels


class FakeQuantize(Function):
    """Values of the deployed form: x float [..., size] -> float32 [..., size], bit for bit the values of its backend.

    clip: float32 [tables, 2], what gets the gradient. tables: the quantizer, with these factors as they are stored.
    Surrogate, for values within half a step of the table: x + (r / r0 - 1) * (x_hat - x0), for those outside: x_hat * r / r0,
    where r is the reach, the step that codes are chosen with, as a function of clip, r0 and x0 as in the forward pass. In the
    uniform kind a clipped value follows the factor of its side alone, an inner one the sum of both. (4, 9, 64), clip (2, 2) ->
    (4, 9, 64).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, tables: Tables, step_dtype: torch.dtype) -> Tensor:
        found = backend_of(x.device).quantized(x, tables, step_dtype)
        ctx.tables = tables
        ctx.save_for_backward(x, *found)
        return found.values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, *saved = ctx.saved_tensors
        tables: Tables = ctx.tables
        wanted: tuple[bool, bool] = ctx.needs_input_grad[:2]
        passed, sums = backend_of(x.device).gradients(x, tables, Quantized(*saved), grads[0], wanted)
        grad_clip = None
        if sums is not None:
            fold = _uniform_clip_gradient if tables.zero is None else _knee_clip_gradient
            high, low = (part.float() for part in extremes(x))
            grad_clip = fold(high, low, tables, Quantized(*saved).table, *sums.unbind(-1))
        return None if passed is None else passed.to(x.dtype), grad_clip, None, None


def _knee_clip_gradient(
    high: Tensor, low: Tensor, tables: Tables, table: Tensor, inner: Tensor, over: Tensor, under: Tensor
) -> Tensor:
    """One step serves both sides: everything goes to the factor of the side that sets it."""
    assert tables.zero is not None
    below = tables.zero.float()
    above = tables.levels[:, -1].float() - below
    up = torch.where(above > 0, tables.clip[:, 0] / above, 0)[table] * high
    down = torch.where(below > 0, tables.clip[:, 1] / below, 0)[table] * low
    side = (down > up).long()
    factor, parts = (2 * table + side).flatten(), (inner + over + under).flatten()
    if backend_of(parts.device).scatters:
        sums = torch.zeros_like(tables.clip).flatten().index_add_(0, factor, parts)
    else:  # in the same order every time
        sums = torch.stack([torch.where(factor == number, parts, 0).sum() for number in range(tables.clip.numel())])
    return sums.view_as(tables.clip) / tables.clip


def _uniform_clip_gradient(
    high: Tensor, low: Tensor, tables: Tables, _: Tensor, inner: Tensor, over: Tensor, under: Tensor
) -> Tensor:
    up, down = high * tables.clip[0, 0], low * tables.clip[0, 1]
    shared = inner / (up + down).clamp(min=1e-30)
    gradients = (shared * high).sum() + over.sum() / tables.clip[0, 0], (shared * low).sum() + under.sum() / tables.clip[0, 1]
    return torch.stack(gradients).unsqueeze(0)


fake_quantize: Callable[[Tensor, Tensor, Tables, torch.dtype], Tensor] = FakeQuantize.apply


class FusedFake(Function):
    """`FakeQuantize` in kernels, over whole inputs: x float [..., width] -> the same shape and dtype.

    clip, tables: as there. size: values that share a step. Only x is kept for the way back. (4, 576), clip (2, 2) -> (4, 576).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, tables: Tables, size: int, step_dtype: torch.dtype) -> Tensor:
        ctx.settings = tables, size, step_dtype
        ctx.save_for_backward(x)
        return kernels_of(x).fake_quantize(x, tables, size, step_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        tables, size, step_dtype = ctx.settings
        wanted: tuple[bool, bool] = ctx.needs_input_grad[:2]
        found = kernels_of(x).fake_quantize_gradients(x, tables, size, step_dtype, grads[0], wanted)
        return *found, None, None, None


fused_fake: Callable[[Tensor, Tensor, Tables, int, torch.dtype], Tensor] = FusedFake.apply


class FusedSoft(Function):
    """`soft_quantize` in kernels, over whole inputs: x float [..., width] -> the same shape and dtype.

    Each group takes the table that its deployed form takes. counts, ratio, clip, temperature: as there. Only x is kept for the
    way back. (4, 576), counts (2, 4), ratio and clip (2, 2) -> (4, 576).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ratio: Tensor,
        clip: Tensor,
        counts: Tensor,
        temperature: float,
        tables: Tables,
        size: int,
        step_dtype: torch.dtype,
    ) -> Tensor:
        ctx.settings = tables, size, step_dtype
        ctx.temperature = temperature
        ctx.save_for_backward(x, ratio, clip, counts)
        return kernels_of(x).soft_quantize(x, tables, size, step_dtype, counts, ratio, clip, temperature)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, ratio, clip, counts = ctx.saved_tensors
        tables, size, step_dtype = ctx.settings
        found = kernels_of(x).soft_quantize_gradients(
            x, tables, size, step_dtype, counts, ratio, clip, ctx.temperature, grads[0]
        )  # fmt: skip
        return *found, None, None, None, None, None


fused_soft: Callable[[Tensor, Tensor, Tensor, Tensor, float, Tables, int, torch.dtype], Tensor] = FusedSoft.apply


def kernels_of(x: Tensor) -> StageKernels:
    """Of the device that has some."""
    found = backend_of(x.device).kernels
    assert found is not None
    return found


def _round_through(x: Tensor) -> Tensor:
    """Rounds; the gradient passes."""
    return x + (x.round() - x).detach()


def soft_quantize(x: Tensor, table: Tensor, counts: Tensor, ratio: Tensor, clip: Tensor, temperature: float) -> Tensor:
    """Knee quantizer with real coarse ratios and a soft knee, for training the knees (LBLLM's soft mask).

    x: float32 [..., size]. table: int64 [...], which table each group takes. counts: float32 [tables, 4], fine levels below and
    above zero, coarse ones below and above. ratio, clip: float32 [tables, 2], coarse steps in fine ones below and above; clipping
    factors above and below, as in `Tables`. temperature: tau of sigmoid((knee - |x|) / tau), in fine steps.
    With integer ratios and temperature to 0 this is the deployed form before its step is refitted. Rounding is straight-through;
    differentiable in x, ratio and clip. (4, 9, 64), table (4, 9) -> (4, 9, 64).
    """
    high, low = extremes(x.detach())
    fine, coarse = counts[:, :2], counts[:, 2:]
    reach = fine + ratio * coarse
    side = torch.where(reach > 0, clip.flip(-1) / reach.clamp(min=1e-9), 0)[table]
    step = torch.maximum(side[..., 0] * low, side[..., 1] * high).clamp(min=1e-30).unsqueeze(-1)
    place = x / step
    negative = place < 0
    size = place.abs()
    knee, steps, width = (
        torch.where(negative, part[..., :1], part[..., 1:]) for part in (fine[table], coarse[table], ratio[table])
    )
    inner = torch.minimum(_round_through(size), knee)
    outer = knee + width * torch.minimum(_round_through((size - knee) / width).clamp(min=0), steps)
    mask = torch.sigmoid((knee - size) / temperature)
    return (mask * inner + (1 - mask) * outer) * step * place.sign()
