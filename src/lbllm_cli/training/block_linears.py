"""The linears of a block in training: their masters, the weights these stand for, and the gradients on the way back."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lbllm_cli.models.block import Block
from lbllm_cli.models.stored import whole_tensors
from lbllm_cli.parallel.group import merged
from lbllm_cli.training.interfaces import OwnStep, ParameterGroup
from lbllm_cli.training.master import LEVELS, WEIGHTS
from lbllm_cli.training.spread import Spread
from lbllm_cli.training.weights import Trainable


class BlockLinears:
    """A copy of the full-precision block whose linears run with the weights of their masters.

    teacher: the full-precision block. start: the parent's tensors of the block, of which those are kept that are the whole
    tensor: norms that it has trained. linears: masters by name in the block, of those that this rank has. trained: kinds of
    parameters that get gradients. spread: who has the others.
    """

    def __init__(
        self, teacher: Block, start: dict[str, Tensor], linears: dict[str, Trainable], trained: tuple[str, ...], spread: Spread
    ):
        self.block = teacher.sharing()
        self.kept = whole_tensors(start)
        for name, tensor in self.kept.items():
            owner, _, last = name.removeprefix(teacher.prefix).rpartition(".")
            value = getattr(teacher.layer.get_submodule(owner), last)
            setattr(self.block.layer.get_submodule(owner), last, nn.Parameter(tensor.to(value), requires_grad=False))
        self.linears = linears
        self.trained, self.spread = trained, spread
        for name in teacher.linears:
            linear = self.block.linear(name)
            linear.weight = nn.Parameter(torch.empty_like(teacher.linear(name).weight))
            spread.expect(teacher.prefix + name, linear)

    def groups(self, rates: dict[str, float]) -> list[ParameterGroup]:
        """See `linear_groups`; rates: of all kinds."""
        return linear_groups(self.linears.values(), {kind: rates[kind] for kind in self.trained if kind in rates})

    def begin(self) -> None:
        """Puts the present weights into the block."""
        put_weights(self.block, self.linears, self.spread)

    def settle(self) -> None:
        """See `Trained`."""
        self.spread.all_arrived()

    def backward(self) -> None:
        """Carries the gradients of the block's weights to the masters."""
        take_gradients(self.block, self.linears)

    def spread_weights(self) -> list[tuple[nn.Parameter, int]]:
        """See `Trained`."""
        return spread_weights(self.block, self.spread)

    def copies(self) -> list[nn.Parameter]:
        """Parameters of masters that every rank has."""
        groups = [] if self.spread.large else self.groups(dict.fromkeys(self.trained, 0.0))
        return [p for group in groups for p in group.params]

    def own_steps(self, dampening: float) -> list[OwnStep]:
        """Parameters that move themselves."""
        return [one for linear in self.linears.values() for one in linear.own_steps(dampening)]

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors of the block, under their full names, on every rank."""
        own: dict[str, Tensor] = {}
        for name, linear in self.linears.items():
            own |= linear.packed().to_tensors(self.block.prefix + name)
        return self.kept | (merged(self.spread.node, own) if self.spread.large else own)


def put_weights(block: Block, linears: Mapping[str, Trainable], spread: Spread) -> None:
    """Puts the present weights of masters, by name in the block, into it; those that others have are on their way from there."""
    spread.all_arrived()
    for name in block.linears:
        weight = block.linear(name).weight
        if name in linears:
            linears[name].put(weight)
        if block.prefix + name in spread.owner:
            spread.send(block.prefix + name, weight)


def spread_weights(block: Block, spread: Spread) -> list[tuple[nn.Parameter, int]]:
    """Weights of a block whose masters are spread, with their owners."""
    found: list[tuple[nn.Parameter, int]] = []
    for name in block.linears:
        weight = block.linear(name).weight
        if (owner := spread.owner.get(block.prefix + name)) is not None and isinstance(weight, nn.Parameter):
            found.append((weight, owner))
    return found


def take_gradients(block: Block, linears: Mapping[str, Trainable]) -> None:
    """Carries the gradients of what `put_weights` put to the masters."""
    for name, linear in linears.items():
        weight = block.linear(name).weight
        if weight.grad is None:
            # Of an expert that no token of the step was sent to.
            linear.skip()
        else:
            linear.take(weight.grad)
            weight.grad = None


def linear_groups(linears: Iterable[Trainable], rates: dict[str, float]) -> list[ParameterGroup]:
    """AdamW groups, one per linear and kind that has a rate: of weights and levels relative to the RMS of the weights."""
    groups = []
    for linear in linears:
        for kind, parameters in linear.kinds().items():
            if kind in rates:
                unit = linear.rms if kind in (WEIGHTS, LEVELS) else 1.0
                groups.append(ParameterGroup(parameters, kind, rates[kind] * unit, unit))
    return groups
