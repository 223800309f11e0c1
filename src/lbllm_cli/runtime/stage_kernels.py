"""Fused forms of what stages compute, for backends that have kernels for it.

Each has a plain form in torch beside its user, which is the reference: a kernel gives the same values within the rounding that
its test states. Widths need not be multiples of the group size; nothing here waits for the device.
"""

from typing import Protocol

import torch
from torch import Tensor

from lbllm_cli.format.activations import Tables

# Where the EM of stage 1 begins: quantiles with one level for the smallest weights, or for the largest; equal parts of the range;
# and Lloyd's levels of a normal distribution, in units of its deviation about the mean.
LOW_QUANTILES, HIGH_QUANTILES = (0.0, 0.15, 0.5, 0.85), (0.15, 0.5, 0.85, 1.0)
RANGE_PARTS = (0.125, 0.375, 0.625, 0.875)
NORMAL_LEVELS = (-1.51, -0.453, 0.453, 1.51)
# And how often levels are chosen out of their table after that, each time for the members that they have by then.
TABLE_ITERATIONS = 5
# Columns of a group that a kernel may hold at once.
COLUMNS_MAX = 128


class StageKernels(Protocol):
    """What a backend may compute in kernels of its own. All floats are float32 where nothing else is said."""

    # Stage 1. Columns of a group lie behind each other in memory: [size, rows].

    def add_products(self, x: Tensor, y: Tensor | None, hessian: Tensor, drift: Tensor | None) -> None:
        """hessian += x^T x, drift += (y - x)^T x: x, y 16-bit floats [tokens, in]; hessian, drift [in, in]. `ptq.moments`.

        Products are exact, or rounded to 16 bits where y - x is; sums are float32.
        """

    def fit_levels(self, weight: Tensor, importance: Tensor, iterations: int, scale: Tensor | None) -> Tensor:
        """`ptq.em.fit_levels`: weight [rows, n], importance [n], scale float16 [rows] -> levels [rows, 4], ascending."""

    def compensate_columns(self, block: Tensor, factor: Tensor, levels: Tensor, push: bool) -> tuple[Tensor, Tensor]:
        """The columns of one group of `ptq.compensate.compensate`.

        block [size, rows], factor [size, size] upper, levels [rows, 4] -> ranks uint8 [size, rows], errors [size, rows]. Nothing
        is written to the arguments; `factor` may be a slice of a larger matrix.
        """

    def descend_columns(self, gradient: Tensor, current: Tensor, hessian: Tensor, levels: Tensor, ranks: Tensor) -> Tensor:
        """The columns of one group of `ptq.refine.descend_codes`.

        gradient, current [size, rows], hessian [size, size], levels [rows, 4] -> by how much each weight moved, [size, rows].
        `ranks`, uint8 [size, rows], are replaced. `hessian` may be a slice of a larger matrix.
        """

    def descend_levels(self, gradient: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor, ranks: Tensor) -> Tensor:
        """The levels of 2 bits of one group of `ptq.row_levels.descend_levels`, at most COLUMNS_MAX columns.

        gradient [size, rows], hessian [size, size], scale float16 [rows], ranks uint8 [size, rows] -> by how much each weight
        moved, [size, rows]. `levels`, int8 [rows, 4] ascending, are replaced. All but gradient and ranks may be slices.
        """

    def normal_equations(self, ranks: Tensor, weighted: Tensor, hessian: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """S H S^T and S H w of `ptq.refine`: ranks uint8 [rows, in], weighted [rows, in], hessian [in, in] -> [rows, u, u],
        of which the part above the diagonal is not written, and [rows, u], u = 4 * groups.
        """

    # Weights in training. A gradient is of the weight, in any float dtype [out, in]; sums are float32 in a fixed order.

    def stored_levels(self, levels: Tensor, level_bits: int) -> Tensor:
        """`training.ste.StoredLevels`, without the check for infinities: [..., groups, 4] -> the same shape."""

    def table_levels(self, levels: Tensor, scale: Tensor, ascending: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same of levels of 2 bits, the nearest of the table in units of their row's scale: [out, groups, 4], float16
        [out, 1]. ascending: as they are ordered, else in code order. dtype: int8 for the levels as they are stored.
        """

    def sort_levels(self, levels: Tensor) -> None:
        """Sorts the four levels of each group, [..., 4], in place."""

    def nearest(self, latent: Tensor, levels: Tensor, weight: Tensor) -> None:
        """Writes each latent's nearest level.

        latent [out, groups, size], levels [out, groups, 4] ascending -> weight [out, in], any float dtype.
        """

    def nearest_sums(self, gradient: Tensor, latent: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of the gradient over the weights of each level, [out, groups, 4], and of its squares over everything, []."""

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
        """AdamW without decay (betas 0.9, 0.95, epsilon 1e-8) on latents, then a share `dampening` of the way to the level that
        each was nearest to before the step.

        moments: exp_avg and exp_avg_sq, of latent's shape. step: [], this step's number. factor: [], what gradients are
        multiplied by. skipped: [], 1 where nothing is to be changed. levels: as they were in `nearest`.
        """

    def decoded(self, codes: Tensor, levels: Tensor, weight: Tensor) -> None:
        """Writes the level of each code: codes uint8 [out, groups, size / 4] packed, levels [out, groups, 4] in code order ->
        weight [out, in], any float dtype."""

    def code_sums(self, gradient: Tensor, codes: Tensor) -> Tensor:
        """Sums of the gradient over the weights of each code: codes packed as in `decoded` -> [out, groups, 4]."""

    # Quantizers in training: x any float dtype [..., width], quantized in groups of `size` along the last axis.

    def fake_quantize(self, x: Tensor, tables: Tables, size: int, step_dtype: torch.dtype) -> Tensor:
        """Values of the deployed form, in x's dtype: `training.act_ste.FakeQuantize`."""

    def fake_quantize_gradients(
        self, x: Tensor, tables: Tables, size: int, step_dtype: torch.dtype, gradient: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x, in its dtype, and of the clipping factors, [tables, 2]. wanted: whether each is."""

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
        """Values of the soft form, in x's dtype: `training.act_ste.soft_quantize`, each group with the table that its deployed
        form takes."""

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
        """Gradients of x, in its dtype, of ratio [tables, 2] and of clip [tables, 2]."""

    def deployed_tables(self, counts: Tensor, ratio: Tensor, codes: int) -> tuple[Tensor, Tensor]:
        """Tables of shapes with rounded ratios, made to fit the lattice as `training.quantizers` does.

        counts [tables, 4], ratio [tables, 2], below and above; codes: levels of a table, 2^bits -> levels uint8 [tables, codes],
        zero uint8 [tables].
        """

    def table_errors(self, x: Tensor, levels: Tensor, zero: Tensor) -> Tensor:
        """Squared error of each group with each of some knee tables alone, nothing clipped.

        x [groups, size], levels uint8 [n, 2^bits], zero uint8 [n] -> [n, groups].
        """
