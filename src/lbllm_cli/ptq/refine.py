"""Going on from a compensated fit under the full Hessian: levels refitted in closed form, codes by coordinate descent.

Both lower  sum over rows of (w - q) H (w - q)^T,  the squared error of the linear's output on the calibration tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from lbllm_cli.format.weights import LEVELS, grouped, ordered, project_levels
from lbllm_cli.ptq.compensate import LevelTable, RankFit

# Relative pull of every level towards its present value: it decides only levels that no weight uses.
_PULL = 1e-6
_CHUNK_BYTES = 64 << 20


def values_of(fit: RankFit, group_size: int) -> Tensor:
    """Weights of a fit in rank order: float32 [out, in]."""
    return fit.values().gather(2, grouped(fit.ranks, group_size).long()).flatten(1)[:, : fit.ranks.shape[1]]


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Relative squared output error, |(W - Q) X|^2 / |W X|^2; weight, quantized [out, in], hessian [in, in]."""
    delta = weight - quantized
    return float(((delta @ hessian) * delta).sum() / ((weight @ hessian) * weight).sum().clamp_min(1e-30))


def _normal_equations(ranks: Tensor, weighted: Tensor, hessian: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """S H S^T and S H w for every row, S the 0/1 matrix that says which weight uses which level.

    ranks: int64 [rows, groups * size], -1 where padded. weighted: W H, [rows, groups * size]. hessian: padded likewise.
    Returns [rows, groups * 4, groups * 4], [rows, groups * 4]. H times one group of S at a time: through a dense S the
    same product costs `groups` times as much.
    """
    rows, size = ranks.shape[0], ranks.shape[1] // groups
    used = one_hot(ranks + 1, LEVELS + 1)[..., 1:].to(hessian.dtype).view(rows, groups, size, LEVELS)
    gram = torch.empty(rows, groups, LEVELS, groups, LEVELS, device=hessian.device)
    transposed = used.transpose(2, 3)
    for group in range(groups):
        # Symmetric: blocks below the diagonal are enough, Cholesky reads no others.
        below = hessian[group * size :, group * size : (group + 1) * size]
        spread = below @ used[:, group].permute(1, 0, 2).reshape(size, rows * LEVELS)
        spread = spread.view(groups - group, size, rows, LEVELS).permute(2, 0, 1, 3)
        gram[:, group:, :, group] = transposed[:, group:] @ spread
    right = (transposed @ weighted.view(rows, groups, size, 1)).view(rows, -1)
    return gram.view(rows, groups * LEVELS, groups * LEVELS), right


def refit_levels(weight: Tensor, hessian: Tensor, fit: RankFit, group_size: int) -> RankFit:
    """Best levels of each row for fixed codes under the full Hessian: 4 x groups unknowns a row, least squares.

    weight: float32 [out, in]. hessian: float32 [in, in], damped. Rows whose system cannot be solved keep their levels.
    The result is on the stored grid, levels ascending. out=576, in=1536, group_size=64 -> 576 systems of 96 unknowns.
    """
    out_features, in_features = weight.shape
    groups = fit.levels.shape[1]
    spare = groups * group_size - in_features
    weighted = pad(weight @ hessian, (0, spare))
    padded = pad(hessian, (0, spare, 0, spare))
    ranks = pad(fit.ranks.long(), (0, spare), value=-1)
    values = fit.values().clone()
    unknowns = groups * LEVELS
    chunk = max(1, _CHUNK_BYTES // (4 * unknowns * (unknowns + groups * group_size)))
    for start in range(0, out_features, chunk):
        rows = slice(start, start + chunk)
        gram, right = _normal_equations(ranks[rows], weighted[rows], padded, groups)
        present = values[rows].reshape(right.shape)
        pull = _PULL * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        gram.diagonal(dim1=1, dim2=2).add_(pull)
        factor, failed = torch.linalg.cholesky_ex(gram)
        solved = torch.cholesky_solve((right + pull * present).unsqueeze(2), factor).squeeze(2)
        good = (failed == 0).unsqueeze(1) & torch.isfinite(solved).all(1, keepdim=True)
        values[rows] = torch.where(good, solved, present).view(-1, groups, LEVELS)
    new_ranks, ascending = ordered(fit.ranks, values, group_size)
    return RankFit(new_ranks, *project_levels(ascending))


def descend_codes(weight: Tensor, hessian: Tensor, fit: RankFit, group_size: int) -> RankFit:
    """One pass over the columns; each code becomes the level nearest to its optimum given all other codes.

    weight: float32 [out, in]. hessian: float32 [in, in], damped (its diagonal is divided by). The output error never
    rises. Levels are unchanged.
    """
    in_features = weight.shape[1]
    values = fit.values()
    current = values_of(fit, group_size).T.contiguous()
    gradient = hessian @ (weight.T - current)
    diagonal = hessian.diagonal()
    ranks = fit.ranks.T.contiguous()
    for group in range(fit.levels.shape[1]):
        start, end = group * group_size, min((group + 1) * group_size, in_features)
        block, moved = gradient[start:end], torch.empty_like(gradient[start:end])
        table = LevelTable(values[:, group])
        for j in range(end - start):
            column = start + j
            ranks[column], value = table.choose(current[column] + block[j] / diagonal[column])
            moved[j] = value - current[column]
            block[j + 1 :].addr_(hessian[column, column + 1 : end], moved[j], alpha=-1)
        gradient[end:].addmm_(hessian[start:end, end:].T, moved, alpha=-1)
    return RankFit(ranks.T.contiguous(), fit.levels, fit.scale)
