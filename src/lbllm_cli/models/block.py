"""One decoder block of a full-precision model, as transformers computes it."""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from lbllm_cli.core.errors import UsageError
from lbllm_cli.models.config import layers, one_block
from lbllm_cli.runtime.attachments import Arguments
from lbllm_cli.runtime.experts import experts_of
from lbllm_cli.runtime.units import Units, find_units

BLOCKS = "model.layers."


def block_prefix(index: int) -> str:
    """Name prefix of a block's tensors: 3 -> "model.layers.3."."""
    return f"{BLOCKS}{index}."


def block_units(config: PretrainedConfig) -> Units:
    """The linears of a block, those together that read the same tensor, in the order in which they are called.

    Raises UsageError naming weights of a block that are neither of a linear, nor of a router, nor vectors: they would be left as
    they are without a word.
    """
    with torch.device("meta"):
        model = one_block(config, 0)
    layer = layers(model)[0]
    names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    own = {f"{name}.weight" for name in names}
    # Which experts a token takes is decided in full precision: a router has a row for each.
    experts = experts_of(layer)
    count = -1 if experts is None else experts.count
    left = [f"{name} {list(t.shape)}" for name, t in layer.named_parameters() if t.dim() > 1 and name not in own]
    if odd := [name for name in left if not re.fullmatch(rf".*\.weight \[{count}, {config.hidden_size}\]", name)]:
        raise UsageError(f"{type(layer).__name__}: {', '.join(odd[:3])} are in no linear; lbllm does not know them")
    return find_units(model, names)


class Block(nn.Module):
    """One decoder block in evaluation mode, with the masks and positions transformers gives it.

    Called with hidden states [rows, length, hidden], returns the same shape; every row starts at position 0. units: its linears,
    those together that read the same tensor; found where they are not given.
    """

    def __init__(
        self, config: PretrainedConfig, index: int, tensors: dict[str, Tensor], dtype: torch.dtype, units: Units | None = None
    ):
        super().__init__()
        with torch.device("meta"):
            model: Any = one_block(config, index)
        # Buffers of the rotary embedding are computed, not stored: built on meta they would have no values.
        model.rotary_emb = type(model.rotary_emb)(config)
        model.norm, model.embed_tokens = nn.Identity(), nn.Identity()
        prefix = block_prefix(index)
        local = {f"layers.0.{name.removeprefix(prefix)}": tensor.to(dtype) for name, tensor in tensors.items()}
        model.load_state_dict(local, strict=True, assign=True)
        device = next(iter(tensors.values())).device
        self.model = model.to(device).eval().requires_grad_(False)
        self.prefix = prefix
        self.units = block_units(config) if units is None else units
        self.dtype = dtype
        self._arguments: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._cache = Arguments(self.model).name

    @property
    def layer(self) -> nn.Module:
        """transformers' own decoder layer."""
        return layers(self.model)[0]

    @property
    def linears(self) -> list[str]:
        """Names of its linears in the block, in the order of its units."""
        return [name for unit in self.units for name in unit]

    def linear(self, name: str) -> nn.Linear:
        """A linear by its name in the block, for example "mlp.up_proj"."""
        module = self.layer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def sharing(self) -> "Block":
        """A copy whose linears can be replaced one by one; tensors are shared until then."""
        twin = copy.copy(self)
        memo = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        twin._modules = {"model": copy.deepcopy(self.model, memo)}
        return twin

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Replaces a linear's weight, [out, in], cast to the block's dtype."""
        self.linear(name).weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """What transformers gives the layer beside hidden states of this shape: mask, angles of the positions.

        Asked of the model around it once for a shape: it takes a dozen launches. With an empty cache, which is taken out again,
        it does not look whether positions are those of several texts, for which a GPU would be waited for.
        """
        key = (*hidden.shape[:2], hidden.dtype)
        if key not in self._arguments:
            handle = self.layer.register_forward_pre_hook(_stop_with_arguments, with_kwargs=True, prepend=True)
            try:
                with torch.no_grad():
                    self.model(inputs_embeds=hidden, use_cache=False, **{self._cache: DynamicCache()})
            except _Arguments as found:
                self._arguments[key] = {name: None if name == self._cache else value for name, value in found.values.items()}
            finally:
                handle.remove()
        return self._arguments[key]

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.layer(hidden, **self.arguments(hidden))
        return output


class _Arguments(Exception):
    """Ends a pass that has come to the layer. values: what the layer was called with."""

    def __init__(self, values: dict[str, Any]):
        super().__init__()
        self.values = values


def _stop_with_arguments(_: nn.Module, args: tuple[Any, ...], values: dict[str, Any]) -> None:
    assert len(args) == 1, "a layer takes hidden states by position, and all else by name"
    raise _Arguments(values)
