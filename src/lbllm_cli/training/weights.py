"""A binarized linear in training: float32 masters whose forward pass gives exactly the weights a checkpoint would hold.

Two parametrisations with one interface. `Nearest`: a latent weight and four levels, the code is the nearest level. `Bitmap`
(the paper's): a latent weight gives the sign, a relaxed bitmap in [0, 1] the pair, alpha and mu of each pair the levels.

    linear = PARAMETRISATIONS["nearest"](weight, packed, {"weights", "levels"}, margin=0.1)
    linear()             float32 [out, in], differentiable in linear.kinds()
    linear.constrain(0.003)   after every optimizer step
    linear.packed()      codes, int8 levels and float16 scale of the present weights
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lbllm_cli.format import weights as binarize
from lbllm_cli.format.levels import level_values
from lbllm_cli.format.weights import PackedWeight, ordered
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.stage_kernels import StageKernels
from lbllm_cli.training.fixed import Fixed
from lbllm_cli.training.interfaces import OwnStep
from lbllm_cli.training.latent import bitmap_latents, nearest_latents, starting_levels
from lbllm_cli.training.master import BITMAP, LEVELS, WEIGHTS, Master
from lbllm_cli.training.ste import (
    bitmap_codes,
    bitmap_level,
    nearest_level,
    nearest_ranks,
    polarisation,
    polarisation_gradient,
)
from lbllm_cli.training.tally import Scale


def _follow(latent: nn.Parameter, values: Tensor, dampening: float) -> None:
    """Pulls latents a share of the way to the levels they chose.

    Without it latents chatter about the edges of their cells, and the state in which a run ends is a random one: on the first
    block of the tests' toy (64 x 256 tokens, 4 epochs) the loss ended at 1.17, with a pull of 0.5 % a step at 0.93.
    """
    if dampening:
        latent.lerp_(values, dampening)


class Nearest(Master):
    """Latent weight [out, groups, size] and levels [out, groups, 4], ascending.

    weight: source weight [out, in]. packed: where to start, its forward pass gives exactly its values. train: kinds
    of parameters that get gradients, latents in any case: codes that stay are `Fixed`. margin: see `training.latent`.
    """

    def __init__(self, weight: Tensor, packed: PackedWeight, train: Collection[str], margin: float):
        super().__init__(weight, packed)
        # Where codes were fixed levels may have crossed.
        ranks, levels = ordered(*binarize.ranks_from_codes(packed.unpacked(), starting_levels(packed)), self.group_size)
        source = binarize.grouped(weight.float(), self.group_size)
        self.latent = nn.Parameter(nearest_latents(source, levels, binarize.grouped(ranks, self.group_size), margin))
        self.levels = nn.Parameter(levels.clone(), requires_grad=LEVELS in train)

    def kinds(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind, frozen ones included."""
        return {WEIGHTS: [self.latent], LEVELS: [self.levels]}

    @property
    def _kernels(self) -> StageKernels | None:
        return backend_of(self.latent.device).kernels

    def forward(self) -> Tensor:
        grouped = nearest_level(self.latent, self._stored(self.levels, ascending=True))
        self.values = grouped.detach()
        return grouped.flatten(1)[:, : self.in_features]

    def put(self, weight: Tensor) -> None:
        if (kernels := self._kernels) is None:
            super().put(weight)
            return
        with torch.no_grad():
            self._held = self._stored(self.levels, ascending=True)
            kernels.nearest(self.latent, self._held, weight)

    def take(self, gradient: Tensor) -> None:
        if (kernels := self._kernels) is None:
            super().take(gradient)
            return
        sums, square = kernels.nearest_sums(gradient, self.latent.detach(), self._held)
        self._gradient, self._square = gradient, square
        if self.levels.requires_grad:
            self.levels.grad = sums

    def own_steps(self, dampening: float) -> list[OwnStep]:
        return [_LatentStep(self, dampening)] if "_gradient" in self.__dict__ else []

    @torch.no_grad()
    def constrain(self, dampening: float) -> None:
        """After a step: levels that crossed are put in order again. dampening: see `_follow`.

        What moved with the step itself is not pulled again.
        """
        if (kernels := self._kernels) is not None:
            kernels.sort_levels(self.levels)
            return
        if self.used:
            _follow(self.latent, self.values, dampening)
        self.levels.copy_(self.levels.sort(dim=-1).values)

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        """The present weights as a checkpoint holds them."""
        stored, scale = self._projected(self.levels, ascending=True)
        ranks = nearest_ranks(self.latent, level_values(stored, scale)).flatten(1)[:, : self.in_features]
        return PackedWeight.of_ranks(ranks, stored, scale, self.group_size, self.level_bits)


class _LatentStep:
    """AdamW on latents whose gradient is that of the weights, and their pull, in one pass over memory."""

    def __init__(self, owner: Nearest, dampening: float):
        self.owner, self.parameter, self.dampening = owner, owner.latent, dampening

    def square(self) -> Tensor:
        return self.owner._square

    @torch.no_grad()
    def step(self, state: dict[str, Tensor], scale: Scale, rate: float) -> None:
        owner, kernels = self.owner, self.owner._kernels
        assert kernels is not None
        moments = state["exp_avg"], state["exp_avg_sq"]
        kernels.latent_step(
            owner.latent, moments, state["step"], owner.__dict__.pop("_gradient"), owner._held, scale.factor, scale.skipped, rate,
            self.dampening,
        )  # fmt: skip


class Bitmap(Master):
    """Latent weight and bitmap, both [out, groups, size]; alpha and mu, both [out, groups, 2], inner and outer pair.

    Arguments as for `Nearest`, but latents may be frozen.
    """

    def __init__(self, weight: Tensor, packed: PackedWeight, train: Collection[str], margin: float):
        super().__init__(weight, packed)
        codes, levels = packed.unpacked(), starting_levels(packed)
        source = binarize.grouped(weight.float(), self.group_size)
        margins = (margin if kind in train else 1.0 for kind in (WEIGHTS, BITMAP))
        latent, bitmap = bitmap_latents(source, levels, binarize.grouped(codes, self.group_size), *margins)
        if WEIGHTS not in train:
            # All that they are asked for is a sign, whatever becomes of the levels: as these are stored they jump.
            latent = torch.where(latent > (levels[..., 0:1] + levels[..., 1:2]) / 2, torch.inf, -torch.inf)
        low, high = levels[..., 0::2], levels[..., 1::2]
        self.latent = nn.Parameter(latent, requires_grad=WEIGHTS in train)
        self.bitmap = nn.Parameter(bitmap, requires_grad=BITMAP in train)
        self.alpha = nn.Parameter((high - low) / 2, requires_grad=LEVELS in train)
        self.mu = nn.Parameter((high + low) / 2, requires_grad=LEVELS in train)

    def kinds(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind, frozen ones included."""
        return {WEIGHTS: [self.latent], LEVELS: [self.alpha, self.mu], BITMAP: [self.bitmap]}

    def _levels(self) -> Tensor:
        """[out, groups, 4] in code order, before they are rounded."""
        return torch.stack([self.mu - self.alpha, self.mu + self.alpha], dim=-1).flatten(-2)

    def forward(self) -> Tensor:
        grouped = bitmap_level(self.latent, self.bitmap, self._stored(self._levels(), ascending=False))
        return grouped.flatten(1)[:, : self.in_features]

    def certainty(self) -> float:
        """Mean of |2 G - 1|: 1 where every bit is certain."""
        return 1 - polarisation(self.bitmap.detach().flatten(1)[:, : self.in_features], 1.0)

    @torch.no_grad()
    def polarise(self, strength: float, beta: float, count: int) -> None:
        """Adds the gradient of strength x (mean over `count` weights of 1 - |2 G - 1|^beta)."""
        assert self.bitmap.grad is not None
        gradient = polarisation_gradient(self.bitmap, beta, count).flatten(1)[:, : self.in_features]
        self.bitmap.grad.flatten(1)[:, : self.in_features].add_(gradient, alpha=strength)

    @torch.no_grad()
    def constrain(self, dampening: float) -> None:
        """After a step: G stays in [0, 1], alpha at or above 0. dampening: see `_follow`."""
        # Towards the inner level of its sign, which always lies on the latent's side of mu0; an outer one may not.
        inner, mean = self.mu[..., :1] - self.alpha[..., :1], self.mu[..., :1]
        if self.latent.requires_grad and self.used:
            _follow(self.latent, torch.where(self.latent > mean, 2 * mean - inner, inner), dampening)
        self.bitmap.clamp_(0, 1)
        self.alpha.clamp_(min=0)

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        """The present weights as a checkpoint holds them: pairs that crossed are named inner and outer again."""
        stored, scale = self._projected(self._levels(), ascending=False)
        levels = level_values(stored, scale)
        codes = bitmap_codes(self.latent, self.bitmap, (levels[..., 0] + levels[..., 1]) / 2)
        # Not from the values: rounding them a second time moves levels whose scale is subnormal.
        ranks, ascending = ordered(
            *binarize.ranks_from_codes(codes.flatten(1)[:, : self.in_features], stored), self.group_size
        )  # fmt: skip
        return PackedWeight.of_ranks(ranks, ascending, scale, self.group_size, self.level_bits)


Trainable = Nearest | Bitmap | Fixed
PARAMETRISATIONS: dict[str, type[Nearest] | type[Bitmap]] = {"nearest": Nearest, "bitmap": Bitmap}
