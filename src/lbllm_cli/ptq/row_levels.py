"""Levels of 2 bits: out of one table, in units of the scale of their row.

Least squares, as `refine` has it for finer levels, leave them between two entries; where a massive input decides, rounding loses
what they gained. So the levels of one group after the other become the best entry under the whole H: all are tried.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lbllm_cli.format.levels import level_max, level_values, stored_grid
from lbllm_cli.format.names import LEVEL_BITS, LEVELS
from lbllm_cli.format.weights import grouped
from lbllm_cli.ptq.compensate import LevelFit, RankFit
from lbllm_cli.ptq.em import nearest_rank
from lbllm_cli.ptq.refine import values_of
from lbllm_cli.ptq.table_choice import best_of_table
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.stage_kernels import COLUMNS_MAX

# What the largest level of the table is, over the root mean square of the row: the best of these is taken. Steps are small: in
# some rows nearly all depends on one weight, behind a massive input, which a fitting scale represents exactly.
_REACHES = tuple(3.2 * 1.06**step for step in range(20))


def fit_row_scale(weight: Tensor, importance: Tensor, group_size: int, fit: LevelFit) -> Tensor:
    """The scale of each row with which its weights, taken one by one, have the least weighted squared error.

    weight: float32 [out, in]. importance: float32 [in]. fit: see `compensate`. Returns float16 [out, 1]; [576, 1536] -> [576, 1].
    """
    groups, costs = grouped(weight, group_size), grouped(importance[None], group_size)[0]
    # Inputs that pad the last group cost nothing, but EM wants weights above 0.
    least = importance.min() * 1e-6
    fitted = [fit(groups[:, at].contiguous(), cost.clamp_min(least)) for at, cost in enumerate(costs)]
    levels, rms = torch.stack(fitted, dim=1), weight.square().mean(1, keepdim=True).sqrt()
    found, smallest = torch.zeros_like(rms, dtype=torch.float16), torch.full_like(rms, torch.inf)
    for reach in _REACHES:
        scale = (rms * (reach / level_max(LEVEL_BITS[2]))).half()
        values = level_values(*stored_grid(levels, LEVEL_BITS[2], scale)).flatten(0, 1)
        nearest = values.gather(1, nearest_rank(groups.flatten(0, 1), values)).view_as(groups)
        error = ((nearest - groups).square() * costs).sum((1, 2))[:, None]
        found, smallest = torch.where(error < smallest, scale, found), torch.minimum(error, smallest)
    return found


def refit_scale(weight: Tensor, hessian: Tensor, fit: RankFit, group_size: int) -> RankFit:
    """The best scale of each row for fixed codes and levels under the full Hessian, one unknown.

    weight: float32 [out, in]. hessian: float32 [in, in]. The output error never rises, but for the rounding to float16.
    """
    quantized = values_of(fit, group_size)
    spread = quantized @ hessian
    power, product = (spread * quantized).sum(1, keepdim=True), (spread * weight).sum(1, keepdim=True)
    factor = torch.where((power > 0) & (product > 0), product / power, 1.0)
    return fit._replace(scale=(fit.scale.float() * factor).half())


def descend_levels(weight: Tensor, hessian: Tensor, fit: RankFit, group_size: int) -> RankFit:
    """The scale refitted, then one pass over the groups: the levels of each become the best of the table given all others. Codes
    are unchanged, the output error never rises. Arguments as for `refit_scale`.
    """
    fit = refit_scale(weight, hessian, fit, group_size)
    gradient = hessian @ (weight - values_of(fit, group_size)).T
    levels, ranks = fit.levels.clone(), fit.ranks.T.contiguous()
    kernels = backend_of(weight.device).kernels
    # Larger groups gain too little from levels of 2 bits to have a kernel.
    one_group = _descend if kernels is None or group_size > COLUMNS_MAX else kernels.descend_levels
    for group in range(levels.shape[1]):
        part = slice(group * group_size, min((group + 1) * group_size, weight.shape[1]))
        moved = one_group(gradient[part], hessian[part, part], levels[:, group], fit.scale[:, group], ranks[part])
        gradient[part.stop :].addmm_(hessian[part, part.stop :].T, moved, alpha=-1)
    return fit._replace(levels=levels)


def _descend(gradient: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor, ranks: Tensor) -> Tensor:
    """The levels of one group.

    gradient: [size, rows]. hessian: [size, size]. levels: int8 [rows, 4], ascending, replaced. scale: [rows]. ranks: uint8 [size,
    rows]. Returns by how much each weight moved, [size, rows].
    """
    used = one_hot(ranks.long(), LEVELS).to(hessian.dtype)
    slope = (used * gradient.unsqueeze(-1)).sum(0)
    curve = torch.einsum("jra,jrb->rab", used, (hessian @ used.flatten(1)).view_as(used))
    before = level_values(levels, scale)
    levels.copy_(best_of_table(slope + (curve @ before.unsqueeze(-1)).squeeze(-1), curve, scale))
    return (used * (level_values(levels, scale) - before)).sum(-1)
