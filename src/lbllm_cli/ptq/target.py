"""The asymmetric target: aim at the full-precision output, compute with the quantized stream's inputs.

Least squares of |W Y - V X|^2 over V gives V = W + W C (H + damping)^-1 with C = mean (y - x) x^T. On few tokens the
full step overfits (measured on SmolLM2-135M with 16k tokens: perplexity 417 instead of 90), so the step's length is
chosen on tokens that C and H were not estimated from, where the error is a parabola with a closed-form minimum.
"""

import torch
from torch import Tensor

from lbllm_cli.ptq.moments import InputMoments


def target_step(weight: Tensor, drift: Tensor, factor: Tensor) -> Tensor:
    """W C (H + damping)^-1, float32 [out, in]: the full step towards the asymmetric target.

    weight: [out, in]. drift: C, [in, in]. factor: U of `inverse_factor`, [in, in], for which (H + damping)^-1 = U^T U.
    """
    return weight @ drift @ factor.T @ factor


def parabola(weight: Tensor, step: Tensor, held_out: InputMoments) -> Tensor:
    """What the error along a step is made of, on held-out tokens: float32 [2], both sums over rows.

    weight, step: float32 [out, in]. With R = W (Y - X):  <R X^T, step> and <step H, step>.
    """
    along = ((weight @ held_out.mean_drift()) * step).sum()
    curvature = ((step @ held_out.mean_hessian()) * step).sum()
    return torch.stack([along, curvature])


def step_length(parabolas: Tensor) -> Tensor:
    """The length in [0, 1] that minimises |W Y - (W + length * step) X|^2: `parabola` [..., 2], summed over rows -> [...]."""
    along, curvature = parabolas.unbind(-1)
    # What is no number stays none: see `fit._check_finite`.
    return torch.where(curvature <= 0, 0.0, (along / curvature).clamp(0, 1))
