"""What the library was told about a model, and whether it still holds: a model may be edited after it was loaded.

Asked at every decode step of every block, so that what can be looked up once is.
"""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules import module as nn_module

from lbllm_cli.activations import ActQuantizer


class CapturedQuantizers:
    """Quantizers that were read once. A change of a buffer in place is counted by torch, but for one through `.data`."""

    def __init__(self, quantizers: Iterable[ActQuantizer]):
        found = list(quantizers)
        # A tensor of inference mode counts no changes, and refuses changes outside of it.
        self.known = [
            (quantizer._buffers, name, tensor, None if tensor is None or tensor.is_inference() else tensor._version)
            for quantizer in found
            for name, tensor in quantizer._buffers.items()
        ]
        self.sizes = [(quantizer.__dict__, quantizer.size) for quantizer in found]

    def hold(self) -> bool:
        """Whether these are still the same, unchanged."""
        for buffers, name, tensor, version in self.known:
            if buffers.get(name) is not tensor or (version is not None and tensor._version != version):  # type: ignore[union-attr]
                return False
        return all(values["size"] == size for values, size in self.sizes)


class CapturedModules:
    """A tree of modules that something else computes instead of: which they are, and that nobody listens to or overrides one."""

    def __init__(self, root: nn.Module):
        self.children = [(parent._modules, name, child) for parent in root.modules() for name, child in parent._modules.items()]
        self.inner = [(module, type(module)) for module in root.modules() if module is not root]
        self.hooks = [hooks for module, _ in self.inner for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.own_hooks = sum(map(len, self.hooks))

    def hold(self) -> bool:
        """Whether none was replaced, wrapped or overridden since."""
        for modules, name, child in self.children:
            if modules.get(name) is not child:
                return False
        for module, kind in self.inner:
            if module.__class__ is not kind or "forward" in module.__dict__:
                return False
        heard = nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
        return not heard and sum(map(len, self.hooks)) == self.own_hooks
