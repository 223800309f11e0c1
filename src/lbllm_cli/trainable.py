"""A binarized linear in training: float32 masters whose forward pass gives exactly the weights a checkpoint would hold.

Two parametrisations with one interface. `Nearest`: a latent weight and four levels, the code is the nearest level. `Bitmap`
(the paper's): a latent weight gives the sign, a relaxed bitmap in [0, 1] the pair, alpha and mu of each pair the levels.

    linear = PARAMETRISATIONS["nearest"](weight, packed, {"weights", "levels"}, margin=0.1)
    linear()             float32 [out, in], differentiable in linear.kinds()
    linear.constrain()   after every optimizer step
    linear.packed()      codes, int8 levels and float16 scale of the present weights
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lbllm_cli.ops import binarize
from lbllm_cli.ops.latent import bitmap_latents, nearest_latents
from lbllm_cli.ops.refine import ordered
from lbllm_cli.ops.ste import BitmapLevel, NearestLevel, StoredLevels, bitmap_codes, nearest_ranks, polarisation, polarisation_gradient

WEIGHTS, LEVELS, BITMAP = "weights", "levels", "bitmap"
Packed = tuple[Tensor, Tensor, Tensor]


def _codes_and_levels(packed: Packed, in_features: int) -> tuple[Tensor, Tensor]:
    """uint8 [out, in] and float32 [out, groups, 4] in code order."""
    return binarize.unpack_codes(packed[0], in_features), binarize.level_values(packed[1], packed[2])


def _pack(ranks: Tensor, levels: Tensor, group_size: int) -> Packed:
    """ranks: uint8 [out, in]. levels: float32 [out, groups, 4] ascending."""
    stored, scale = binarize.project_levels(levels)
    codes, by_code = binarize.codes_from_ranks(ranks, stored, scale)
    return binarize.pack_codes(codes, group_size), by_code, scale


class Nearest(nn.Module):
    """Latent weight [out, groups, size] and levels [out, groups, 4], ascending.

    weight: source weight [out, in]. packed: where to start, its forward pass gives exactly what `decode` gives. train: kinds
    of parameters that get gradients. margin: see `ops.latent`. rms: root mean square of the source weight.
    """

    def __init__(self, weight: Tensor, packed: Packed, train: Collection[str], margin: float):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.group_size = packed[0].shape[2] * 4
        self.rms = float(weight.float().square().mean().sqrt())
        ranks, levels = binarize.ranks_from_codes(*_codes_and_levels(packed, self.in_features))
        source = binarize.grouped(weight.float(), self.group_size)
        latent = nearest_latents(source, levels, binarize.grouped(ranks, self.group_size), margin)
        self.latent = nn.Parameter(latent, requires_grad=WEIGHTS in train)
        self.levels = nn.Parameter(levels.clone(), requires_grad=LEVELS in train)

    def kinds(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind, frozen ones included."""
        return {WEIGHTS: [self.latent], LEVELS: [self.levels]}

    def forward(self) -> Tensor:
        grouped = NearestLevel.apply(self.latent, StoredLevels.apply(self.levels))
        return grouped.flatten(1)[:, : self.in_features]

    @torch.no_grad()
    def constrain(self) -> None:
        """Levels that crossed are put in order again."""
        self.levels.copy_(self.levels.sort(dim=-1).values)

    @torch.no_grad()
    def packed(self) -> Packed:
        """The present weights as a checkpoint holds them."""
        ranks = nearest_ranks(self.latent, StoredLevels.apply(self.levels)).flatten(1)[:, : self.in_features]
        return _pack(ranks, self.levels, self.group_size)


class Bitmap(nn.Module):
    """Latent weight and bitmap, both [out, groups, size]; alpha and mu, both [out, groups, 2], inner and outer pair.

    Arguments as for `Nearest`.
    """

    def __init__(self, weight: Tensor, packed: Packed, train: Collection[str], margin: float):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.group_size = packed[0].shape[2] * 4
        self.rms = float(weight.float().square().mean().sqrt())
        codes, levels = _codes_and_levels(packed, self.in_features)
        source = binarize.grouped(weight.float(), self.group_size)
        latent, bitmap = bitmap_latents(source, levels, binarize.grouped(codes, self.group_size), margin)
        low, high = levels[..., 0::2], levels[..., 1::2]
        self.latent = nn.Parameter(latent, requires_grad=WEIGHTS in train)
        self.bitmap = nn.Parameter(bitmap, requires_grad=BITMAP in train)
        self.alpha = nn.Parameter((high - low) / 2, requires_grad=LEVELS in train)
        self.mu = nn.Parameter((high + low) / 2, requires_grad=LEVELS in train)

    def kinds(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind, frozen ones included."""
        return {WEIGHTS: [self.latent], LEVELS: [self.alpha, self.mu], BITMAP: [self.bitmap]}

    def _levels(self) -> Tensor:
        """[out, groups, 4] in code order, on the stored grid."""
        return StoredLevels.apply(torch.stack([self.mu - self.alpha, self.mu + self.alpha], dim=-1).flatten(-2))

    def forward(self) -> Tensor:
        grouped = BitmapLevel.apply(self.latent, self.bitmap, self._levels())
        return grouped.flatten(1)[:, : self.in_features]

    def certainty(self) -> float:
        """Mean of |2 G - 1|: 1 where every bit is certain."""
        return 1 - polarisation(self.bitmap.detach().flatten(1)[:, : self.in_features], 1.0)

    @torch.no_grad()
    def polarise(self, strength: float, beta: float, count: int) -> None:
        """Adds the gradient of strength x (mean over `count` weights of 1 - |2 G - 1|^beta)."""
        assert self.bitmap.grad is not None
        self.bitmap.grad.add_(polarisation_gradient(self.bitmap, beta, count), alpha=strength)

    @torch.no_grad()
    def constrain(self) -> None:
        """G stays in [0, 1], alpha at or above 0."""
        self.bitmap.clamp_(0, 1)
        self.alpha.clamp_(min=0)

    @torch.no_grad()
    def packed(self) -> Packed:
        """The present weights as a checkpoint holds them: pairs that crossed are named inner and outer again."""
        levels = self._levels()
        codes = bitmap_codes(self.latent, self.bitmap, (levels[..., 0] + levels[..., 1]) / 2)
        by_rank, ascending = ordered(*binarize.ranks_from_codes(codes.flatten(1)[:, : self.in_features], levels), self.group_size)
        return _pack(by_rank, ascending, self.group_size)


Trainable = Nearest | Bitmap
PARAMETRISATIONS: dict[str, type[Nearest] | type[Bitmap]] = {"nearest": Nearest, "bitmap": Bitmap}
