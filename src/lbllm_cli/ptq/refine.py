"""Going on from a compensated fit under the full Hessian: levels refitted in closed form, codes by coordinate descent.

Both lower  sum over rows of (w - q) H (w - q)^T,  the squared error of the linear's output on the calibration tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from lbllm_cli.format.levels import project_levels, stored_grid
from lbllm_cli.format.names import LEVELS
from lbllm_cli.format.weights import group_count, grouped, ordered
from lbllm_cli.ptq.compensate import LevelTable, RankFit
from lbllm_cli.runtime.backend import backend_of

# Relative pull of every level towards its present value: it decides only levels that no weight uses.
_PULL = 1e-6
# Normal equations of so many bytes at once. A GPU takes a share of what is free: in pieces of this size the launches for a matrix
# of a 70B model go into the millions.
_CHUNK_BYTES = 64 << 20
_SHARE_OF_FREE, _MOST_BYTES = 4, 4 << 30


def values_of(fit: RankFit, group_size: int) -> Tensor:
    """Weights of a fit in rank order: float32 [out, in]."""
    return fit.values().gather(2, grouped(fit.ranks, group_size).long()).flatten(1)[:, : fit.ranks.shape[1]]


def output_errors(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """Squared output error and what it is relative to, |(W - Q) X|^2 and |W X|^2, [2]; both are sums over rows.

    weight, quantized: [out, in]. hessian: [in, in].
    """
    delta = weight - quantized
    return torch.stack([((delta @ hessian) * delta).sum(), ((weight @ hessian) * weight).sum()])


def relative_error(sums: Tensor) -> Tensor:
    """Out of `output_errors` [..., 2], summed over rows: [...]."""
    return sums[..., 0] / sums[..., 1].clamp_min(1e-30)


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


def _equations(ranks: Tensor, weighted: Tensor, hessian: Tensor, group_size: int) -> Callable[[slice], tuple[Tensor, Tensor]]:
    """`_normal_equations` of some rows. ranks: uint8 [out, in]. weighted: [out, in]. hessian: [in, in]."""
    if (kernels := backend_of(ranks.device).kernels) is not None:
        return lambda rows: kernels.normal_equations(ranks[rows], weighted[rows], hessian, group_size)
    groups = group_count(ranks.shape[1], group_size)
    spare = groups * group_size - ranks.shape[1]
    wide, square = pad(weighted, (0, spare)), pad(hessian, (0, spare, 0, spare))
    padded = pad(ranks.long(), (0, spare), value=-1)
    return lambda rows: _normal_equations(padded[rows], wide[rows], square, groups)


def refit_levels(weight: Tensor, hessian: Tensor, fit: RankFit, group_size: int) -> RankFit:
    """Best levels of each row for fixed codes under the full Hessian: 4 x groups unknowns a row, least squares.

    weight: float32 [out, in]. hessian: float32 [in, in], damped. Rows whose system cannot be solved keep their levels.
    The result is on the stored grid, levels ascending. out=576, in=1536, group_size=64 -> 576 systems of 96 unknowns.
    """
    out_features, groups = fit.levels.shape[:2]
    backend = backend_of(weight.device)
    equations = _equations(fit.ranks, weight @ hessian, hessian, group_size)
    grid = project_levels if backend.kernels is None else stored_grid
    values = fit.values().clone()
    unknowns = groups * LEVELS
    most = _CHUNK_BYTES if backend.kernels is None else min(_MOST_BYTES, backend.free_memory(weight.device) // _SHARE_OF_FREE)
    # Beside a row's system its Cholesky factor, and in torch the one-hot form of its ranks.
    chunk = max(1, most // (4 * unknowns * (unknowns + groups * group_size)))
    for start in range(0, out_features, chunk):
        rows = slice(start, start + chunk)
        gram, right = equations(rows)
        present = values[rows].reshape(right.shape)
        pull = _PULL * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        gram.diagonal(dim1=1, dim2=2).add_(pull)
        factor, failed = torch.linalg.cholesky_ex(gram)
        solved = torch.cholesky_solve((right + pull * present).unsqueeze(2), factor).squeeze(2)
        good = (failed == 0).unsqueeze(1) & torch.isfinite(solved).all(1, keepdim=True)
        values[rows] = torch.where(good, solved, present).view(-1, groups, LEVELS)
    new_ranks, ascending = ordered(fit.ranks, values, group_size)
    return RankFit(new_ranks, *grid(ascending, fit.level_bits), fit.level_bits)


def descend_codes(weight: Tensor, hessian: Tensor, fit: RankFit, group_size: int) -> RankFit:
    """One pass over the columns; each code becomes the level nearest to its optimum given all other codes.

    weight: float32 [out, in]. hessian: float32 [in, in], damped (its diagonal is divided by). The output error never
    rises. Levels are unchanged.
    """
    in_features = weight.shape[1]
    values = fit.values()
    current = values_of(fit, group_size).T.contiguous()
    gradient = hessian @ (weight.T - current)
    ranks = fit.ranks.T.contiguous()
    kernels = backend_of(weight.device).kernels
    columns = _descend if kernels is None else kernels.descend_columns
    for group in range(fit.levels.shape[1]):
        part = slice(group * group_size, min((group + 1) * group_size, in_features))
        moved = columns(gradient[part], current[part], hessian[part, part], values[:, group], ranks[part])
        gradient[part.stop :].addmm_(hessian[part, part.stop :].T, moved, alpha=-1)
    return fit._replace(ranks=ranks.T.contiguous())


def _descend(gradient: Tensor, current: Tensor, hessian: Tensor, levels: Tensor, ranks: Tensor) -> Tensor:
    """The columns of one group in turn.

    gradient, current: [size, rows], of which the first is changed. hessian: [size, size]. levels: [rows, 4]. ranks: uint8 [size,
    rows], replaced. Returns by how much each weight moved, [size, rows].
    """
    table, moved, diagonal = LevelTable(levels), torch.empty_like(gradient), hessian.diagonal()
    for j in range(len(gradient)):
        ranks[j], value = table.choose(current[j] + gradient[j] / diagonal[j])
        moved[j] = value - current[j]
        gradient[j + 1 :].addr_(hessian[j, j + 1 :], moved[j], alpha=-1)
    return moved
