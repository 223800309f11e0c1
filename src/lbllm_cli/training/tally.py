"""What optimizer steps came to, counted on the device: to look at a loss or a norm is to wait for it.

A step that is not finite changes nothing, the gradients of others are scaled down to a limit that follows the usual norm. All of
it is arithmetic in float64 on tensors without a dimension, the same on every device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lbllm_cli.training.progress import Progress

# The usual gradient norm follows the present one by this share a step.
_FOLLOW = 0.1
# Of `Progress`, in the order of a tally's values; behind them the loss and the norm of the step itself.
_COUNTED = ("usual_norm", "norm_max", "loss_sum", "norm_sum", "taken", "skipped")


class Scale(NamedTuple):
    """What becomes of a step. factor: of all gradients, float32 []. skipped: float32 [], 1 where it is not finite."""

    factor: Tensor
    skipped: Tensor


class Tally:
    """values: float64 [8]. clip: largest gradient norm, in units of the usual one."""

    def __init__(self, device: torch.device, clip: float):
        self.clip = clip
        self.values = torch.zeros(len(_COUNTED) + 2, dtype=torch.float64, device=device)

    def load(self, progress: Progress) -> None:
        """Goes on from what was counted."""
        counted = [float(getattr(progress, name)) for name in _COUNTED]
        self.values = torch.tensor([*counted, 0.0, 0.0], dtype=torch.float64).to(self.values.device)

    def add(self, loss: Tensor, norm: Tensor) -> Scale:
        """Counts one step; loss, norm: float32 []."""
        usual, most, losses, norms, taken, skipped, *_ = self.values.unbind()
        loss, norm = loss.double(), norm.double()
        limit = torch.where(usual != 0, self.clip * usual, torch.inf)
        clipped = torch.minimum(norm, limit)
        follows = torch.where(usual != 0, usual + _FOLLOW * (clipped - usual), clipped)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        done = torch.stack([follows, torch.maximum(most, norm), losses + loss, norms + norm, taken + 1, skipped, loss, norm])
        missed = torch.stack([usual, most, losses, norms, taken, skipped + 1, loss, norm])
        self.values = torch.where(finite, done, missed)
        # A gradient that is not finite stays so: what is multiplied by it is not used.
        factor = torch.where(norm > limit, limit / norm, 1.0)
        return Scale(factor.float(), (~finite).float())


def store(values: list[float], progress: Progress) -> tuple[float, float]:
    """Puts a tally's values into the progress; returns loss and norm of the last step."""
    for name, value in zip(_COUNTED, values, strict=False):
        setattr(progress, name, type(getattr(progress, name))(value))
    return values[-2], values[-1]
