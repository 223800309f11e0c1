"""One optimizer step: gradients of everything that is trained, their norm, and AdamW's move of the masters."""

import torch
from torch import Tensor, nn

from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.training.exchange import Exchange
from lbllm_cli.training.interfaces import OwnStep, ParameterGroup, Trained
from lbllm_cli.training.tally import Scale, Tally

_BETAS = (0.9, 0.95)
# Sets of parameters whose units are kept on the device.
_KINDS = 8


class Update:
    """AdamW over the masters of `trained` that this rank has. exchange: whose copies every rank has and moves alike."""

    def __init__(self, trained: Trained, exchange: Exchange, device: torch.device):
        self.trained, self.exchange, self.device = trained, exchange, device
        # Of more ranks on a machine than a block has linears some own nothing, and still take part.
        self.groups = trained.groups() or [ParameterGroup([], "nothing", 0.0, 1.0)]
        options = [{"params": group.params, "lr": group.top} for group in self.groups]
        self.optimizer = torch.optim.AdamW(options, weight_decay=0.0, betas=_BETAS, fused=True)
        self.backend = backend_of(device)
        self._units: dict[tuple[float, ...], Tensor] = {}

    def take(self, loss: Tensor, tally: Tally, factor: float) -> None:
        """The one place where gradients become a step: they are complete here, and nothing is between here and the masters.

        loss: of the step, float32 []. factor: share of the top learning rates.
        """
        own = {id(one.parameter): one for one in self.trained.own_steps()}
        every = [(p, group.unit) for group in self.groups for p in group.params]
        plain = {id(p): p.grad for p, _ in every if p.grad is not None}
        norms = dict(zip(plain, torch._foreach_norm(list(plain.values())), strict=True)) if plain else {}
        if own:
            norms |= dict(zip(own, torch._foreach_sqrt([one.square() for one in own.values()]), strict=True))
        copies = {id(p) for p in self.exchange.copies}
        mine = [(norms[id(p)], unit) for p, unit in every if id(p) in norms and id(p) not in copies]
        shared = [(norms[id(p)], unit) for p, unit in every if id(p) in norms and id(p) in copies]
        scale = tally.add(loss, self.exchange.node.norm(self._scaled(mine), self._scaled(shared)))
        # In RAM it costs nothing to look; elsewhere the optimizer looks where it computes.
        if not self.backend.shares_ram or not bool(scale.skipped):
            self._move(own, list(plain.values()), scale, factor)
        self.optimizer.zero_grad(set_to_none=True)

    def _scaled(self, found: list[tuple[Tensor, float]]) -> Tensor:
        """Norms of gradients in units of their parameters, [n]."""
        if not found:
            return torch.zeros(0, device=self.device)
        return torch.stack([part for part, _ in found]) * self._on_device(tuple(unit for _, unit in found))

    def _on_device(self, units: tuple[float, ...]) -> Tensor:
        """Units of some parameters: those of the last few sets that steps have moved. Of experts it is another one every time."""
        if units not in self._units:
            if len(self._units) >= _KINDS:
                self._units.clear()
            transfers, values = self.backend.transfers(self.device), torch.tensor(units)
            self._units[units] = values if transfers is None else transfers.small(values)
        return self._units[units]

    def _move(self, own: dict[int, OwnStep], gradients: list[Tensor], scale: Scale, factor: float) -> None:
        """AdamW's step, of own parameters and of all others."""
        if gradients:
            torch._foreach_mul_(gradients, scale.factor)
        for options, group in zip(self.optimizer.param_groups, self.groups, strict=True):
            options["lr"] = group.top * factor
        if not self.backend.shares_ram:
            self.optimizer.found_inf = scale.skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        rates = {id(p): group.top * factor for group in self.groups for p in group.params}
        states = [self._state(one.parameter) for one in own.values()]
        if states:
            numbers = [state["step"] for state in states]
            torch._foreach_add_(numbers, 1.0)
            torch._foreach_sub_(numbers, [scale.skipped] * len(numbers))
        for (key, one), state in zip(own.items(), states, strict=True):
            one.step(state, scale, rates[key])
        self.trained.constrain()

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What AdamW keeps of a parameter."""
        state: dict[str, Tensor] = self.optimizer.state[parameter]
        if not state:
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state.update(step=torch.zeros((), device=self.device), **zeros)
        return state
