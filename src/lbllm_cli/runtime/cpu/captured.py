"""What the library was told about a model, and whether it still holds: a model may be edited after it was loaded.

Asked at every decode step of every block: whole tables are compared at once, and an element that is the same object is not looked
into.
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from lbllm_cli.runtime.quantizer import ActQuantizer


class CapturedQuantizers:
    """Quantizers that were read once. A change of a buffer in place is counted by torch, but for one through `.data`."""

    def __init__(self, quantizers: Iterable[ActQuantizer]):
        self.quantizers = list(quantizers)
        self.tables = [(quantizer._buffers, list(quantizer._buffers.values())) for quantizer in self.quantizers]
        self.sizes = [quantizer.size for quantizer in self.quantizers]
        # A tensor of inference mode counts no changes, and refuses changes outside of it.
        self.counted = [
            tensor for _, tensors in self.tables for tensor in tensors if isinstance(tensor, Tensor) and not tensor.is_inference()
        ]
        self.versions = [tensor._version for tensor in self.counted]

    def hold(self) -> bool:
        """Whether these are still the same, unchanged."""
        for buffers, tensors in self.tables:
            if not all(map(is_, buffers.values(), tensors)):
                return False
        return [x._version for x in self.counted] == self.versions and [x.size for x in self.quantizers] == self.sizes


class CapturedModules:
    """A tree of modules that something else computes instead of: which they are, and that nobody listens to or overrides one.

    standing: what stands for the `forward` of a module in it, and may.
    """

    def __init__(self, root: nn.Module, standing: Mapping[Any, Any] | None = None):
        self.children = [(parent._modules, list(parent._modules.values())) for parent in root.modules() if parent._modules]
        # A quantizer's forward is not called in a full pass of the library either: who listens to it hears nothing anyway.
        self.inner = [module for module in root.modules() if module is not root and not isinstance(module, ActQuantizer)]
        self.standing = [(standing or {}).get(module) for module in self.inner]
        self.kinds = [module.__class__ for module in self.inner]
        # Their keys are numbers that torch never gives twice: they tell a hook from another that took its place.
        self.hooks = [hooks for module in self.inner for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.own_hooks = list(chain.from_iterable(self.hooks))

    def hold(self) -> bool:
        """Whether none was replaced, wrapped or overridden since."""
        for modules, children in self.children:
            if list(modules.values()) != children:
                return False
        if [x.__dict__.get("forward") for x in self.inner] != self.standing:
            return False
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return False
        if list(chain.from_iterable(self.hooks)) != self.own_hooks:
            return False
        return [x.__class__ for x in self.inner] == self.kinds
