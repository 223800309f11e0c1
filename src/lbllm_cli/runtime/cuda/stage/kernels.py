"""The kernels of stages: what is allocated for them, and in which order they run."""

import torch
from torch import Tensor

from lbllm_cli.format.activations import Tables
from lbllm_cli.format.names import LEVELS
from lbllm_cli.format.weights import group_count
from lbllm_cli.runtime.cuda.activations import quantize_values
from lbllm_cli.runtime.cuda.stage import codes as packed
from lbllm_cli.runtime.cuda.stage import columns, em, latents, normal, order, quantizers, soft
from lbllm_cli.runtime.cuda.stage import moments as products
from lbllm_cli.runtime.cuda.stage import tables as knees
from lbllm_cli.runtime.stage_kernels import COLUMNS_MAX


def long_rows(rows: int, width: int) -> int:
    """The fewest rows that so many values can be cut into, of whole ones, in which a place has 32 bits, behind the end too, where
    a program's last groups are: 80,000 rows of 28,672 are two of 40,000.
    """
    parts = -(-rows * width // (2**31 - 2**16))
    return next(count for count in range(max(1, parts), rows + 1) if rows % count == 0)


def _rows(x: Tensor) -> Tensor:
    """[..., width] -> [rows, width], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


class TritonKernels:
    """`StageKernels` in Triton."""

    def add_products(self, x: Tensor, y: Tensor | None, hessian: Tensor, drift: Tensor | None) -> None:
        x = x.contiguous()
        products.square(x, hessian)
        if y is not None and drift is not None:
            products.drift(x, y.contiguous(), drift)

    def fit_levels(self, weight: Tensor, importance: Tensor, iterations: int, scale: Tensor | None) -> Tensor:
        weight = weight.contiguous()
        levels = weight.new_empty(len(weight), LEVELS)
        scales = None if scale is None else scale.contiguous()
        em.fit(weight, importance.contiguous(), weight.sort(dim=1).values, scales, iterations, levels)
        return levels

    def compensate_columns(self, block: Tensor, factor: Tensor, levels: Tensor, push: bool) -> tuple[Tensor, Tensor]:
        ranks, errors = torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
        most, size = COLUMNS_MAX, len(block)
        if push and size > most:
            block = block.clone()
        for start in range(0, size, most):
            part = slice(start, min(start + most, size))
            columns.compensate(block[part], factor[part, part], levels, push, ranks[part], errors[part])
            if push and part.stop < size:
                block[part.stop :].addmm_(factor[part, part.stop :].T, errors[part], alpha=-1)
        return ranks, errors

    def descend_columns(self, gradient: Tensor, current: Tensor, hessian: Tensor, levels: Tensor, ranks: Tensor) -> Tensor:
        moved = torch.empty_like(gradient)
        most, size = COLUMNS_MAX, len(gradient)
        if size > most:
            gradient = gradient.clone()
        for start in range(0, size, most):
            part = slice(start, min(start + most, size))
            columns.descend(gradient[part], current[part], hessian[part, part], levels, ranks[part], moved[part])
            if part.stop < size:
                gradient[part.stop :].addmm_(hessian[part, part.stop :].T, moved[part], alpha=-1)
        return moved

    def descend_levels(self, gradient: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor, ranks: Tensor) -> Tensor:
        moved = torch.empty_like(gradient)
        columns.descend_of_levels(gradient, hessian, levels, scale, ranks, moved)
        return moved

    def normal_equations(self, ranks: Tensor, weighted: Tensor, hessian: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        rows, width = ranks.shape
        unknowns = group_count(width, group_size) * LEVELS
        gram, right = weighted.new_empty(rows, unknowns, unknowns), weighted.new_empty(rows, unknowns)
        normal.fill_gram(ranks, hessian, group_size, gram)
        normal.sum_ranks(weighted, ranks, group_size, right)
        return gram, right

    def stored_levels(self, levels: Tensor, level_bits: int) -> Tensor:
        levels = levels.contiguous()
        found = torch.empty_like(levels)
        latents.store(levels, found, level_bits)
        return found

    def table_levels(self, levels: Tensor, scale: Tensor, ascending: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        levels = levels.contiguous()
        found = torch.empty_like(levels, dtype=dtype)
        latents.store_on_table(levels, scale.contiguous(), found, ascending)
        return found

    def sort_levels(self, levels: Tensor) -> None:
        order.sort_levels(levels)

    def nearest(self, latent: Tensor, levels: Tensor, weight: Tensor) -> None:
        latents.nearest(latent, levels, weight)

    def nearest_sums(self, gradient: Tensor, latent: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        sums, squares = torch.empty_like(levels), latents.squares_of(latent)
        latents.sum_levels(gradient.contiguous(), latent, levels, sums, squares)
        return sums, squares.sum()

    def latent_step(
        self,
        latent: Tensor,
        moments: tuple[Tensor, Tensor],
        step: Tensor,
        gradient: Tensor,
        levels: Tensor,
        factor: Tensor,
        skipped: Tensor,
        rate: float,
        dampening: float,
    ) -> None:
        latents.step_latents(latent, *moments, step, gradient.contiguous(), levels, factor, skipped, rate, dampening)

    def decoded(self, codes: Tensor, levels: Tensor, weight: Tensor) -> None:
        packed.decode(codes, levels, weight)

    def code_sums(self, gradient: Tensor, codes: Tensor) -> Tensor:
        sums = torch.empty(*codes.shape[:2], LEVELS, device=codes.device)
        packed.sum_codes(gradient.contiguous(), codes, sums)
        return sums

    def fake_quantize(self, x: Tensor, tables: Tables, size: int, step_dtype: torch.dtype) -> Tensor:
        if not x.numel():
            return torch.empty_like(x)
        rows = _rows(x)
        if x.shape[-1] % size == 0:
            # Heads are narrow: groups of many of them fill a program.
            rows = rows.view(long_rows(*rows.shape), -1)
        found = torch.empty_like(rows)
        quantize_values(rows, quantizers.prepared(tables), size, found, step_dtype)
        return found.view(x.shape)

    def fake_quantize_gradients(
        self, x: Tensor, tables: Tables, size: int, step_dtype: torch.dtype, gradient: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        rows, made = _rows(x), quantizers.prepared(tables)
        passed = torch.empty_like(rows) if wanted[0] else None
        (programs,), _ = quantizers.grouping(rows, size)
        parts = made.factors.new_empty(tables.clip.numel(), programs) if wanted[1] else None
        quantizers.find_gradients(
            rows, _rows(gradient), made.lattice, made.factors, tables.clip, made.count, made.places, size, step_dtype,
            passed, parts,
        )  # fmt: skip
        sums = None if parts is None else parts.sum(1).view(tables.clip.shape)
        return None if passed is None else passed.view(x.shape), sums

    def soft_quantize(
        self,
        x: Tensor,
        tables: Tables,
        size: int,
        step_dtype: torch.dtype,
        counts: Tensor,
        ratio: Tensor,
        clip: Tensor,
        tau: float,
    ) -> Tensor:
        rows, made = _rows(x), quantizers.prepared(tables)
        found = torch.empty_like(rows)
        soft.quantize(rows, made.lattice, made.factors, made.places, size, counts, ratio, clip, tau, found)
        return found.view(x.shape)

    def soft_quantize_gradients(
        self,
        x: Tensor,
        tables: Tables,
        size: int,
        step_dtype: torch.dtype,
        counts: Tensor,
        ratio: Tensor,
        clip: Tensor,
        tau: float,
        gradient: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, made = _rows(x), quantizers.prepared(tables)
        passed = torch.empty_like(rows)
        (programs,), _ = quantizers.grouping(rows, size)
        parts = ratio.new_empty(2 * ratio.numel(), programs)
        soft.find_gradients(
            rows, _rows(gradient), made.lattice, made.factors, made.places, size, counts, ratio, clip, tau, passed, parts
        )
        of_ratio, of_clip = parts.sum(1).view(2, *ratio.shape)
        return passed.view(x.shape), of_ratio, of_clip

    def deployed_tables(self, counts: Tensor, ratio: Tensor, codes: int) -> tuple[Tensor, Tensor]:
        levels = torch.empty(len(counts), codes, dtype=torch.uint8, device=counts.device)
        zero = levels.new_empty(len(counts))
        knees.deploy(counts, ratio, levels, zero)
        return levels, zero

    def table_errors(self, x: Tensor, levels: Tensor, zero: Tensor) -> Tensor:
        made = quantizers.prepared(Tables(levels, zero, x.new_ones(len(levels), 2)))
        errors = x.new_empty(len(levels), len(x))
        knees.find_errors(x.contiguous(), made.lattice, made.factors, errors)
        return errors
