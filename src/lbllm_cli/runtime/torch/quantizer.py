"""The activation quantizer where values are wanted and not codes, and its gradients, in torch: what every backend agrees with."""

import torch
from torch import Tensor

from lbllm_cli.format.activations import Quantized, Tables, dequantize, quantize, reciprocal


def quantized(x: Tensor, tables: Tables, step_dtype: torch.dtype = torch.float32, piece: int | None = None) -> Quantized:
    """Quantizes groups: x float [..., size]. step_dtype: what steps are rounded to. piece: see `format.activations.quantize`.

    [2, 7, 9, 64] -> values [2, 7, 9, 64], the rest [2, 7, 9].
    """
    codes = quantize(x, tables, step_dtype, piece)
    return Quantized(dequantize(codes, tables.levels), codes.step, codes.zero, codes.table)


def gradients(
    x: Tensor, tables: Tables, found: Quantized, gradient: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """What the surrogate of `training.act_ste.FakeQuantize` passes on of a gradient of its values, float32 [..., size].

    found: of x. wanted: whether each result is. First the gradient of x where it lies within half a step of the table, else 0:
    float32 [..., size]. Second sums over each group, float32 [..., 3]: of gradient * (value - x) over those inside, of gradient *
    value over those above the table, and below it. (4, 9, 64) -> (4, 9, 64), (4, 9, 3).
    """
    inputs, sums = wanted
    x = x.float()
    lattice_top = tables.levels[:, -1].float()[found.table]
    place = x * reciprocal(found.step).unsqueeze(-1) + found.zero.float().unsqueeze(-1)
    # Half a step beyond the outermost level still rounds to it.
    over, under = place > lattice_top.unsqueeze(-1) + 0.5, place < -0.5
    inside = ~(over | under)
    parts = None
    if sums:
        terms = gradient * (found.values - x) * inside, gradient * found.values * over, gradient * found.values * under
        parts = torch.stack([term.sum(-1) for term in terms], -1)
    return gradient * inside if inputs else None, parts
