"""What is hung into transformers' own modules: quantizers before linears, keys and values, and the proof that a pass met them.

Everything is an object that holds its modules, not a closure over them: a copy of a model has hooks with its own quantizers.
"""

import inspect
from importlib.metadata import version
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.core.errors import RunError
from lbllm_cli.format.names import KEYS, VALUES, input_name
from lbllm_cli.runtime.shared_input import SharedInput
from lbllm_cli.runtime.units import Units

# What transformers has called the cache that a forward takes: up to 5.23, and since.
CACHE_ARGUMENTS = ("past_key_values", "cache")
_MET = "_met_by"
# Names that transformers has for ways to compute one and the same attention.
_PLAIN = (None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def meet(quantizer: nn.Module) -> None:
    """Notes that this thread's pass has come through a quantizer."""
    if not torch.compiler.is_compiling():
        # Past nn.Module.__setattr__, which takes longer than all the rest. A set: passes of several threads run side by side.
        quantizer.__dict__.setdefault(_MET, set()).add(get_ident())


class Arguments:
    """Where a module's `forward` takes its cache. Raises RunError naming the module where it takes none that is known."""

    def __init__(self, module: nn.Module):
        names = list(inspect.signature(type(module).forward).parameters)
        found = [name for name in CACHE_ARGUMENTS if name in names]
        if not found:
            raise RunError(
                f"{type(module).__name__} of transformers {version('transformers')} takes no cache by a known name: expected "
                f"{' or '.join(CACHE_ARGUMENTS)}, got {', '.join(names[1:])}; install a version that lbllm-cli was tested with"
            )
        self.name, self.place = found[0], names.index(found[0]) - 1

    def cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache of a call, None where there is none."""
        if len(args) > self.place:
            return args[self.place]
        found = kwargs.get(self.name)
        if found is not None:
            return found
        # A caller may use the name of another version, which transformers then exchanges.
        return next((kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)

    def with_cache(self, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with this cache."""
        if len(args) > self.place:
            return (*args[: self.place], cache, *args[self.place + 1 :]), kwargs
        return args, {**{name: value for name, value in kwargs.items() if name not in CACHE_ARGUMENTS}, self.name: cache}


class Passing:
    """Stands where a cache would: keys and values pass through their quantizers and are not kept."""

    def __init__(self, keys: nn.Module, values: nn.Module):
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """[rows, heads, length, head_dim], keys after the rotary embedding."""
        meet(self.keys)
        meet(self.values)
        return self.keys(keys), self.values(values)


class _WithoutCache:
    """Before attention: where no cache is given, keys and values pass through quantizers alone."""

    def __init__(self, attention: nn.Module, passing: Passing):
        self.arguments, self.passing = Arguments(attention), passing

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.arguments.cache(args, kwargs) is not None:
            return args, kwargs
        return self.arguments.with_cache(self.passing, args, kwargs)


class _Quantizing:
    """Before a linear: its input quantized. A linear in a unit of the kernels quantizes its input itself."""

    def __init__(self, quantizer: nn.Module):
        self.quantizer = quantizer

    def __call__(self, linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if getattr(linear, "unit", None) is not None:
            return args
        meet(self.quantizer)
        return self.quantizer(args[0]), *args[1:]


class _Sharing:
    """Before attention or MLP: its input goes to several linears."""

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if torch.compiler.is_compiling():
            return args, kwargs
        if args:
            return (SharedInput.of(args[0]), *args[1:]), kwargs
        name = next((name for name in ("hidden_states", "x") if name in kwargs), None)
        return args, kwargs if name is None else {**kwargs, name: SharedInput.of(kwargs[name])}


class Proof:
    """After a decoder layer: the pass has met every quantizer that is switched on.

    A transformers that calls its modules in another way would otherwise run on, in full precision and without a word. An
    exception in the middle of a pass leaves marks, and the next pass of that thread may then miss what it should have found;
    what is wrong with a version is wrong in every pass.
    """

    def __init__(self, quantizers: dict[str, nn.Module]):
        self.quantizers = quantizers

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        # A linear that was taken out took its quantizer along, which nobody can switch off any more: keys tell for all.
        if torch.compiler.is_compiling() or not getattr(self.quantizers[KEYS], "enabled", True):
            return
        thread, missed = get_ident(), []
        for name, quantizer in self.quantizers.items():
            met = quantizer.__dict__.get(_MET)
            if met is not None and thread in met:
                met.discard(thread)
            elif getattr(quantizer, "enabled", True):
                missed.append(name)
        if missed:
            index = getattr(getattr(layer, "self_attn", None), "layer_idx", "?")
            raise RunError(
                f"block {index}: a pass did not come through the quantizers of {', '.join(missed)}; they would have been left "
                f"out. lbllm-cli was not tested with transformers {version('transformers')}, or the block was changed: see "
                "docs/compatibility.md for versions, or switch quantization of activations off"
            )


def plain_attention(config: Any) -> bool:
    """Whether attention is the softmax of scores that every implementation of transformers' own computes; one that somebody has
    registered may be anything. config: a model's, as it is now.
    """
    return getattr(config, "_attn_implementation", None) in _PLAIN


def taken_proof(layer: nn.Module) -> Proof | None:
    """The proof that hangs on a layer, taken off it, for whoever stands for the layer's forward and asks it himself.

    A layer with a hook takes torch's slow way through `__call__`, in decode steps too, which need no proof.
    """
    for key, hook in list(layer._forward_hooks.items()):
        if isinstance(hook, Proof):
            del layer._forward_hooks[key]
            return hook
    return None


def share_inputs(layer: nn.Module, units: Units) -> list[Any]:
    """Lets linears that read one input share what they work out of it. Returns handles that take it back."""
    owners = {unit[0].rpartition(".")[0] for unit in units if len(unit) > 1}
    return [layer.get_submodule(name).register_forward_pre_hook(_Sharing(), with_kwargs=True) for name in sorted(owners)]


def attach(layer: nn.Module, units: Units, quantizers: dict[str, nn.Module]) -> list[Any]:
    """Lets a decoder layer's linears read quantized inputs and its attention quantized keys and values.

    layer: transformers' own. units: of its linears. quantizers: by name in the block, of each unit's input, KEYS and VALUES. Keys
    and values of a pass with a cache are the cache's business (`kv_cache`). Returns handles that take everything back. A pass
    that leaves out one of them raises RunError, and a layer whose attention takes no cache by a known name is refused here.
    """
    handles: list[Any] = share_inputs(layer, units)
    for unit in units:
        before = _Quantizing(quantizers[input_name(unit)])
        handles += [layer.get_submodule(linear).register_forward_pre_hook(before) for linear in unit]
    attention = layer.get_submodule("self_attn")
    without_cache = _WithoutCache(attention, Passing(quantizers[KEYS], quantizers[VALUES]))
    handles.append(attention.register_forward_pre_hook(without_cache, with_kwargs=True))
    return [*handles, layer.register_forward_hook(Proof(quantizers))]
