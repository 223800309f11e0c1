"""The linears of a block in training: their masters, the weights these stand for, and the gradients on the way back."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.models.model import LINEARS, Block
from lbllm_cli.runtime.quantizer import TENSORS
from lbllm_cli.training.weights import LEVELS, WEIGHTS, Fixed, Packed, Trainable


class BlockLinears:
    """A copy of the full-precision block whose linears run with the weights of their masters.

    teacher: the full-precision block. start: the parent's tensors of the block, of which those are kept that are the whole
    tensor: norms that it has trained. linears: masters by name in the block. trained: kinds of parameters that get gradients.
    """

    def __init__(self, teacher: Block, start: dict[str, Tensor], linears: dict[str, Trainable], trained: tuple[str, ...]):
        self.block = teacher.sharing()
        self.kept = whole_tensors(start)
        for name, tensor in self.kept.items():
            owner, _, last = name.removeprefix(teacher.prefix).rpartition(".")
            value = getattr(teacher.layer.get_submodule(owner), last)
            setattr(self.block.layer.get_submodule(owner), last, nn.Parameter(tensor.to(value), requires_grad=False))
        self.linears = linears
        self.trained = trained
        self._current: dict[str, Tensor] = {}
        for name in LINEARS:
            self.block.linear(name).weight = nn.Parameter(torch.empty_like(teacher.linear(name).weight))

    def groups(self, rates: dict[str, float]) -> list[dict[str, Any]]:
        """See `linear_groups`; rates: of all kinds."""
        return linear_groups(self.linears.values(), {kind: rates[kind] for kind in self.trained if kind in rates})

    def begin(self) -> None:
        """Puts the present weights into the block."""
        for name, linear in self.linears.items():
            self._current[name] = linear()
            with torch.no_grad():
                self.block.linear(name).weight.copy_(self._current[name])

    def backward(self) -> None:
        """Carries the gradients of the block's weights to the masters."""
        for name in self.linears:
            weight = self.block.linear(name).weight
            assert weight.grad is not None
            current = self._current.pop(name)
            if current.requires_grad:
                current.backward(weight.grad.float())
            weight.grad = None

    def followers(self) -> list[Tensor]:
        """Frozen latents: they stay on their levels, which move."""
        latents = [linear.latent for linear in self.linears.values() if not isinstance(linear, Fixed)]
        return [latent for latent in latents if not latent.requires_grad]

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors of the block, under their full names."""
        tensors = dict(self.kept)
        for name, linear in self.linears.items():
            tensors |= named(self.block.prefix + name, linear.packed())
        return tensors


def linear_groups(linears: Iterable[Trainable], rates: dict[str, float]) -> list[dict[str, Any]]:
    """AdamW groups, one per linear and kind that has a rate: of weights and levels relative to the RMS of the weights."""
    groups = []
    for linear in linears:
        for kind, parameters in linear.kinds().items():
            if kind in rates:
                unit = linear.rms if kind in (WEIGHTS, LEVELS) else 1.0
                groups.append({"params": parameters, "kind": kind, "top": rates[kind] * unit, "unit": unit})
    return groups


def whole_tensors(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a block's stored tensors, those that are neither a part of a packed linear nor of a quantizer."""
    names = [(name, *name.rpartition(".")[::2]) for name in stored]
    return {name: stored[name] for name, owner, last in names if last not in TENSORS and f"{owner}.scale" not in stored}


def named(prefix: str, packed: Packed) -> dict[str, Tensor]:
    """Full names of a linear's packed tensors."""
    return dict(zip((f"{prefix}.weight", f"{prefix}.levels", f"{prefix}.scale"), packed, strict=True))


def packed_of(start: dict[str, Tensor], prefix: str, device: torch.device) -> Packed:
    """A linear's packed tensors out of those of its block, by its full name."""
    weight, levels, scale = (start[f"{prefix}.{part}"].to(device) for part in ("weight", "levels", "scale"))
    return weight, levels, scale
