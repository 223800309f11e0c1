"""What the library was told about a model, and whether it still holds: a model may be edited after it was loaded."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules import module as nn_module


def _version(tensor: Tensor) -> int:
    # A tensor of inference mode counts no changes, and refuses changes outside of it.
    return -1 if tensor.is_inference() else tensor._version


class CapturedTensors:
    """Tensors that were read once. A change in place is counted by torch, but for one through `.data`."""

    def __init__(self, tensors: Iterable[Tensor | None]):
        self.tensors = list(tensors)
        self.versions = [None if tensor is None else _version(tensor) for tensor in self.tensors]

    def hold(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether these are still the same, unchanged."""
        return all(
            now is then and (now is None or _version(now) == version)
            for now, then, version in zip(tensors, self.tensors, self.versions, strict=True)
        )


class CapturedModules:
    """A tree of modules that something else computes instead of: which they are, and that nobody listens to or overrides one."""

    def __init__(self, root: nn.Module):
        self.children = [(parent._modules, name, child) for parent in root.modules() for name, child in parent._modules.items()]
        self.sizes = [(parent._modules, len(parent._modules)) for parent in root.modules()]
        self.inner = [(module, type(module)) for module in root.modules() if module is not root]
        self.hooks = [hooks for module, _ in self.inner for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.own_hooks = sum(map(len, self.hooks))

    def hold(self) -> bool:
        """Whether nothing was replaced, wrapped, added or overridden since."""
        return (
            all(modules.get(name) is child for modules, name, child in self.children)
            and all(len(modules) == size for modules, size in self.sizes)
            and all(module.__class__ is kind and "forward" not in module.__dict__ for module, kind in self.inner)
            and sum(map(len, self.hooks)) == self.own_hooks
            and not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
        )
