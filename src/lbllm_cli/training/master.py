"""What is common to binarized linears in training: their weights enter a block, and gradients of these come back."""

import torch
from torch import Tensor, nn

from lbllm_cli.training.interfaces import OwnStep

# Kinds of parameters.
WEIGHTS, LEVELS, BITMAP, SCALES = "weights", "levels", "bitmap", "scales"


class Master(nn.Module):
    """A linear: its weights as a checkpoint would hold them, made of parameters in float32."""

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
        present = self.__dict__.pop("_present")
        if present.requires_grad:
            present.backward(gradient.float())

    def skip(self) -> None:
        """Instead of `take`, where what was put was not used."""
        for name in ("_present", "_gradient"):
            self.__dict__.pop(name, None)

    def own_steps(self, dampening: float) -> list[OwnStep]:
        """See `Trained`. dampening: as for `constrain`."""
        return []
