"""What is common to binarized linears in training: their weights enter a block, and gradients of these come back."""

import torch
from torch import Tensor, nn

from lbllm_cli.format.levels import project_levels
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.training.interfaces import OwnStep
from lbllm_cli.training.ste import stored_levels

# Kinds of parameters.
WEIGHTS, LEVELS, BITMAP, SCALES = "weights", "levels", "bitmap", "scales"


class Master(nn.Module):
    """A linear: its weights as a checkpoint would hold them, made of parameters in float32.

    weight: source weight [out, in]; rms: its root mean square. row_scale: see `PackedWeight.row_scale`. factor: what the levels
    of a group, or of a row where that has one scale, are multiplied by: [out, groups or 1, 1], or None. used: whether the last
    step had a gradient for it.
    """

    row_scale: Tensor | None
    factor: nn.Parameter | None

    def __init__(self, weight: Tensor, packed: PackedWeight):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.group_size, self.level_bits = packed.group_size, packed.level_bits
        self.rms = float(weight.float().square().mean().sqrt())
        self.register_buffer("row_scale", packed.row_scale)
        self.factor = None
        self.used = False

    def forward(self) -> Tensor:
        """float32 [out, in]."""
        raise NotImplementedError

    def put(self, weight: Tensor) -> None:
        """Writes the present weights into a block's, [out, in]."""
        self._present = self()
        with torch.no_grad():
            weight.copy_(self._present)

    def take(self, gradient: Tensor) -> None:
        """Carries the gradient of what was put, [out, in], to the parameters."""
        present, self.used = self.__dict__.pop("_present"), True
        if present.requires_grad:
            present.backward(gradient.float())

    def _scale(self) -> Tensor | None:
        """That levels of 2 bits are stored in units of: float16 [out, 1]."""
        if self.row_scale is None or self.factor is None:
            return self.row_scale
        return (self.row_scale.float() * self.factor.detach()[..., 0]).half()

    def _scaled(self, levels: Tensor) -> Tensor:
        """Before they are rounded."""
        return levels if self.factor is None else levels * self.factor

    def _stored(self, levels: Tensor, ascending: bool) -> Tensor:
        """Values of levels as they are stored, [out, groups, 4], differentiable. ascending: False for code order."""
        return stored_levels(self._scaled(levels), self.level_bits, self._scale(), ascending)

    def _projected(self, levels: Tensor, ascending: bool) -> tuple[Tensor, Tensor]:
        """int8 levels and scales of each group, as a checkpoint has them."""
        return project_levels(self._scaled(levels), self.level_bits, self._scale(), ascending)

    def skip(self) -> None:
        """Instead of `take`, where what was put was not used: the linear stays where it is."""
        self.used = False
        for name in ("_present", "_gradient"):
            self.__dict__.pop(name, None)

    def own_steps(self, dampening: float) -> list[OwnStep]:
        """See `Trained`. dampening: as for `constrain`."""
        return []
