"""Second moments of a linear's inputs, and what error compensation needs of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lbllm_cli.runtime.backend import backend_of

# Each retry multiplies the damping by ten. Four retries from 0.01 reach 100 x the mean diagonal, where H is a multiple
# of the identity for every purpose: a failure there means non-finite numbers, not a lack of damping.
CHOLESKY_RETRIES = 4


@dataclass
class InputMoments:
    """Sums over tokens of a linear's inputs x (quantized stream) and y (full-precision stream).

    hessian: float32 [in, in], sum of x x^T. drift: float32 [in, in], sum of (y - x) x^T, or None when the
    full-precision stream is not followed. tokens: how many were summed.
    """

    hessian: Tensor
    drift: Tensor | None
    tokens: int = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device, with_drift: bool) -> "InputMoments":
        """All-zero moments of a linear with `in_features` inputs."""
        zeros = torch.zeros(in_features, in_features, device=device)
        return cls(zeros, torch.zeros_like(zeros) if with_drift else None)

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adds the tokens of one batch: x, y [..., in], any float dtype; summed in float32."""
        x = x.reshape(-1, x.shape[-1])
        kernels = backend_of(x.device).kernels if x.itemsize == 2 else None
        if kernels is not None:
            kernels.add_products(x, None if y is None else y.reshape(x.shape), self.hessian, self.drift)
            self.tokens += x.shape[0]
            return
        x = x.float()
        self.hessian.addmm_(x.T, x)
        if self.drift is not None and y is not None:
            self.drift.addmm_((y.reshape(x.shape).float() - x).T, x)
        self.tokens += x.shape[0]

    def plus(self, other: "InputMoments") -> "InputMoments":
        """The moments of both token sets together."""
        drift = None if self.drift is None or other.drift is None else self.drift + other.drift
        return InputMoments(self.hessian + other.hessian, drift, self.tokens + other.tokens)

    def mean_hessian(self) -> Tensor:
        """H: float32 [in, in], mean of x x^T over tokens."""
        return self.hessian / max(self.tokens, 1)

    def mean_drift(self) -> Tensor:
        """C: float32 [in, in], mean of (y - x) x^T over tokens.

        Raises ValueError when the full-precision stream was not followed.
        """
        if self.drift is None:
            raise ValueError("these moments hold no drift: the full-precision stream was not followed")
        return self.drift / max(self.tokens, 1)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * I; where H is zero (a linear that no token reaches), the identity.

    An input that is zero on every calibration token gets the damping alone: it is coded by its nearest level,
    pushes no error anywhere and counts next to nothing in the fit of its group's levels.
    """
    mean = hessian.diagonal().mean()
    ridge = torch.where(mean > 0, mean * damping, torch.ones_like(mean))
    return hessian + ridge * torch.eye(hessian.shape[0], device=hessian.device)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """Upper Cholesky factor U of the damped inverse Hessian, H^-1 = U^T U (GPTQ, arXiv 2210.17323).

    hessian: float32 [in, in]. Returns (damped H, U, the damping used): when the factorisation fails, the damping is
    multiplied by ten and tried again, CHOLESKY_RETRIES times.

    Raises FloatingPointError when H is not finite or no damping helps.
    """
    for retry in range(CHOLESKY_RETRIES + 1):
        strength = damping * 10.0**retry
        h = damped(hessian, strength)
        upper, good = _inverse_factor(h)
        # The one look at the device. A Hessian that is not finite has no finite factor.
        if bool(good):
            return h, upper, strength
        if not bool(torch.isfinite(hessian).all()):
            raise FloatingPointError("the Hessian is not finite")
    raise FloatingPointError(f"the Cholesky factorisation fails up to damping {strength:g}")


def _inverse_factor(h: Tensor) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the inverse of h, [in, in], and whether it is one, bool []."""
    lower, failed = torch.linalg.cholesky_ex(h)
    # torch refuses to invert what has a zero on its diagonal, and a factorisation that failed may.
    lower.diagonal().copy_(torch.where(failed == 0, lower.diagonal(), 1))
    upper, again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper, (failed == 0) & (again == 0) & torch.isfinite(upper).all()
