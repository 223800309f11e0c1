"""Experts of a mixture as modules of their own: `experts.3.gate_proj` is a linear like any other.

transformers keeps all experts of a block in tensors of three axes, which have no linears that could be binarized one by one. What
stands for them here is called in the same way, by transformers' own router and block.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

# The last linear of an expert.
DOWN = "down_proj"
# Parameters of transformers that hold all experts' linears.
_FUSED = ("gate_up_proj", "down_proj")
_EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.(\w+)$")


def expert_of(linear: str) -> tuple[str, int, str] | None:
    """Where a linear of an expert is, by its name in the block; None for one of no expert.

    "mlp.experts.3.up_proj" -> ("mlp.experts", 3, "up_proj").
    """
    match = _EXPERT.match(linear)
    return None if match is None else (match[1], int(match[2]), match[3])


class _Gate:
    """What transformers does with the products of gate and up: a fused module's own function, without the module.

    interleaved: whether it takes them alternately, or one behind the other.
    """

    def __init__(self, fused: Any, interleaved: bool):
        # Constants and the activation are all that the function reads.
        self.constants = nn.Module()
        kept = {key: value for key, value in vars(fused).items() if not key.startswith("_")}
        self.constants.__dict__.update(kept | fused._modules)
        self.apply, self.interleaved = type(fused)._apply_gate, interleaved

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        both = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)
        found: Tensor = self.apply(self.constants, both)
        return found


class _Linear(nn.Linear):
    """A linear whose values are loaded: drawing random ones for 18,000 of them takes half a minute, on the meta device too."""

    def reset_parameters(self) -> None:
        """Leaves values as they are."""


class Expert(nn.Module):
    """One expert: x [n, hidden] -> [n, hidden]. widths: hidden and inner. like: a tensor of the dtype and device of weights."""

    def __init__(self, gate: _Gate, widths: tuple[int, int], bias: bool, like: Tensor):
        super().__init__()
        hidden, inner = widths
        self.gate_proj = _Linear(hidden, inner, bias, like.device, like.dtype)
        self.up_proj = _Linear(hidden, inner, bias, like.device, like.dtype)
        self.down_proj = _Linear(inner, hidden, bias, like.device, like.dtype)
        # It has no parameters, and all experts of a block share it.
        self._gate = gate

    def inner(self, x: Tensor) -> Tensor:
        """What `down_proj` reads, [n, inner]."""
        return self._gate(self.gate_proj(x), self.up_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.inner(x))
        return output


class Experts(nn.Module):
    """All experts of a block, as children "0", "1", ...

    fused: transformers' module with `gate_up_proj` and `down_proj`; its values are not taken over. Called with hidden states
    [tokens, hidden], chosen experts int64 [tokens, k] and their weights [tokens, k]. (6, 64), (6, 2), (6, 2) -> (6, 64).
    """

    def __init__(self, fused: Any):
        super().__init__()
        up, down = fused.gate_up_proj, fused.down_proj
        transposed = bool(getattr(fused, "is_transposed", False))
        gate = _Gate(fused, not getattr(fused, "is_concatenated", True))
        widths = (up.shape[1], down.shape[1]) if transposed else (up.shape[2], down.shape[2])
        self.count = int(up.shape[0])
        for number in range(self.count):
            self.add_module(str(number), Expert(gate, widths, hasattr(fused, "gate_up_proj_bias"), up))

    def expert(self, number: int) -> Expert:
        """One of them."""
        found = self._modules[str(number)]
        assert isinstance(found, Expert)
        return found

    def tokens_of(self, chosen: Tensor) -> tuple[Tensor, list[int]]:
        """Choices in the order of experts, int64 [tokens * k], of which each is that of token `choice // k`; and how many choose
        each expert. A GPU is waited for: how many tokens go where decides what is launched.

        chosen: int64 [tokens, k]. [[2, 0], [0, 1]] -> [1, 2, 3, 0], [2, 1, 1].
        """
        order = chosen.flatten().argsort(stable=True)
        return order, torch.bincount(chosen.flatten(), minlength=self.count).tolist()

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if hidden.is_meta:
            # Without values: whatever an expert reads, it reads something of its own.
            for number in range(self.count):
                self.expert(number)(torch.empty_like(hidden))
            return torch.empty_like(hidden)
        order, counts = self.tokens_of(chosen)
        pieces = hidden[order // chosen.shape[1]].split(counts)
        found = torch.cat([self.expert(number)(piece) for number, piece in enumerate(pieces) if len(piece)])
        # By token again, and summed there: adding to rows by index has no fixed order on a GPU.
        by_token = found[order.argsort()].view(*chosen.shape, -1)
        return (by_token * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


def separate_experts(layer: nn.Module) -> None:
    """Puts `Experts` in the place of a decoder layer's fused ones, without values. A layer that has none stays as it is."""
    for name, module in list(layer.named_modules()):
        if all(isinstance(getattr(module, parameter, None), nn.Parameter) for parameter in _FUSED):
            layer.set_submodule(name, Experts(module))


def experts_of(layer: nn.Module) -> Experts | None:
    """A decoder layer's experts, None where it has none."""
    return next((module for module in layer.modules() if isinstance(module, Experts)), None)
