"""A simulated `cuda:0`: tensors that say they lie on it, and keep their values in tensors of the CPU inside.

Every operator on one of them comes through `Device.call`, which refuses what CUDA refuses, counts what a device would do, and
computes on the inside. What makes tensors without being given one (`torch.empty(..., device="cuda")`) is registered with torch's
dispatcher as CUDA's own, so that it is met on every thread, autograd's included.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from simulated_gpu import values
from simulated_gpu.accounting import Accounts, Memory
from simulated_gpu.costs import cost_of, is_free
from simulated_gpu.nested import mapped, mapped_values, tensors_of
from simulated_gpu.rules import Rules, check_devices, computes, synchronises
from simulated_gpu.streams import Timeline
from torch import Tensor
from torch._ops import OpOverload

CUDA = torch.device("cuda:0")
# What makes tensors out of none, or copies to the device.
_FACTORIES = (
    "empty.memory_format", "empty_strided", "full", "scalar_tensor", "arange", "arange.start", "arange.start_step", "eye",
    "eye.m", "linspace", "randperm", "randperm.generator", "tril_indices", "triu_indices", "copy_", "_to_copy",
)  # fmt: skip
_IMPLEMENTATIONS = torch.library.Library("aten", "IMPL")


class SimulatedTensor(torch.Tensor):
    """A tensor on `cuda:0`. inner: the tensor of the CPU that holds its values."""

    inner: Tensor
    device_of: "Device"

    @staticmethod
    def __new__(cls, inner: Tensor, device: "Device") -> "SimulatedTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=CUDA
        )  # fmt: skip
        made.inner, made.device_of = inner, device
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _device_of(tensors_of(args, kwargs)).call(function, args, kwargs or {})

    def data_ptr(self) -> int:
        # Nothing lies there.
        return (1 << 46) + self.inner.untyped_storage()._cdata * 16 + self.inner.storage_offset() * self.inner.element_size()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def record_stream(self, stream: Any) -> None:
        """See `torch.Tensor.record_stream`."""
        self.device_of.record(self, stream.number)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; copy it to the host first")

    def pin_memory(self, *_: Any) -> Any:
        raise RuntimeError("only tensors of the CPU can be pinned")

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"SimulatedTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            with torch.no_grad():
                copied: Tensor = self.clone()
            whole = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
            memo[id(self)] = whole.requires_grad_(self.requires_grad)
        found: Tensor = memo[id(self)]
        return found


def _device_of(leaves: list[Tensor]) -> "Device":
    return next(x.device_of for x in leaves if isinstance(x, SimulatedTensor))


def inside(x: Any) -> Any:
    """The tensor of the CPU in a tensor of the device; everything else as it is."""
    return x.inner if isinstance(x, SimulatedTensor) else x


class Operator:
    """What is known of an operator. changed: places and names of the arguments that it changes."""

    def __init__(self, function: OpOverload):
        self.function = function
        self.name = str(function.overloadpacket)
        self.arguments = [argument.name for argument in function._schema.arguments]
        self.free, self.own = is_free(function, self.name), self.name.startswith("lbllm.")
        schema = function._schema.arguments
        self.changed = [(n, a.name) for n, a in enumerate(schema) if a.alias_info is not None and a.alias_info.is_write]

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Of a call's tensors, those that it changes."""
        if not self.changed:
            return []
        return tensors_of([args[place] if place < len(args) else kwargs.get(name) for place, name in self.changed], {})


_operator = cache(Operator)


class Device:
    """One simulated GPU.

    shape: large tensors have no values, so that large models pass. counting: whether kernels, bytes and FLOP are counted, a
    fifth of the time that an operator takes here. total: its memory, bytes.
    """

    def __init__(self, shape: bool):
        self.shape = self.counting = shape
        self.total = 0
        self.rules = Rules()
        self.accounts = Accounts()
        self.timeline = Timeline(self.rules.complain)
        self.memory = Memory(self.timeline.freed)
        # Of the package's own, those that ran.
        self.operators: set[str] = set()

    def install(self) -> None:
        """Lets torch make tensors here."""
        for name in _FACTORIES:
            packet, _, overload = name.partition(".")
            function = getattr(getattr(torch.ops.aten, packet), overload or "default")
            _IMPLEMENTATIONS.impl(name, partial(self._made, function), "CUDA")

    def _made(self, function: OpOverload, *args: Any, **kwargs: Any) -> Any:
        return self.call(function, args, kwargs)

    def wrap(self, inner: Any) -> Any:
        """A tensor of the CPU as one of the device."""
        if not isinstance(inner, Tensor):
            return inner
        self.memory.track(inner, self.accounts.phase)
        return SimulatedTensor(inner, self)

    def record(self, tensor: SimulatedTensor, stream: int) -> None:
        """A stream uses a tensor until it is done with what it has been given."""
        use = self.timeline.uses.get(tensor.inner.untyped_storage()._cdata)
        if use is not None:
            use.recorded.add(stream)

    def waited(self, kind: str) -> None:
        """The host waits for the device."""
        if computes():
            self.accounts.synchronised(kind)
        self.rules.synchronised(kind)

    def call(self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operator."""
        with self.timeline.lock:
            return self._call(function, args, kwargs)

    def _call(self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operator = _operator(function)
        name = operator.name
        leaves = tensors_of(args, kwargs)
        here = [x for x in leaves if isinstance(x, SimulatedTensor)]
        elsewhere = [x for x in leaves if not isinstance(x, SimulatedTensor)]
        written = operator.written(args, kwargs)
        check_devices(function, name, args, here, elsewhere, written)
        if name in ("aten._to_copy", "aten.copy_"):
            return self._copy(operator, args, kwargs)
        if name == "aten._local_scalar_dense":
            self._wait("item")
            return values.number(here[0].inner)
        if name == "aten.equal":
            self._wait("equal")
            return values.same(*(x.inner for x in here))
        if synchronises(name, args):
            self._wait("a shape that depends on values")
        for indices in elsewhere:
            if indices.dim():
                self._upload(indices, False)
        return self._compute(operator, args, kwargs, here, written)

    def _compute(
        self, operator: Operator, args: Any, kwargs: dict[str, Any], here: list[SimulatedTensor], written: list[Tensor]
    ) -> Any:
        inner_args, inner_kwargs = mapped(inside, args), mapped_values(inside, kwargs)
        inner_kwargs.pop("pin_memory", None)
        if inner_kwargs.get("device") is not None:
            inner_kwargs["device"] = torch.device("cpu")
        run: Callable[..., Any] = values.run_without if self.shape else _run
        found = run(operator.function, operator.name, inner_args, inner_kwargs, [inside(x) for x in written])
        changed = {id(inside(x)): x for x in written}
        if any(x.shape != inside(x).shape for x in written):
            raise NotImplementedError(f"{operator.function} changes the shape of its argument")

        def outside(x: Any) -> Any:
            return changed.get(id(x)) if id(x) in changed else self.wrap(x)

        results = mapped(outside, found) if isinstance(found, list | tuple) else outside(found)
        if operator.own:
            self.operators.add(operator.name)
        if not operator.free:
            made = tensors_of(results if isinstance(results, list | tuple) else (results,), {})
            outputs = {id(x): inside(x) for x in (*made, *written) if isinstance(x, SimulatedTensor)}
            self._account(operator, inner_args, inner_kwargs, [x.inner for x in here], list(outputs.values()))
        return results

    def _account(
        self, operator: Operator, args: Any, kwargs: dict[str, Any], inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        if self.counting:
            named = dict(zip(operator.arguments, args, strict=False)) | kwargs
            cost = cost_of(operator.function, operator.name, args, named, inputs, outputs)
            self.accounts.launched(operator.name, *cost)
        self._touch(inputs, outputs)

    def _touch(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.timeline.enqueue()
        for tensors, changes in ((inputs, False), (outputs, True)):
            for key in {x.untyped_storage()._cdata for x in tensors}:
                self.timeline.touch(key, changes)

    # Copies between RAM and the device.

    def _copy(self, operator: Operator, args: Any, kwargs: dict[str, Any]) -> Any:
        if operator.name == "aten.copy_":
            to, source = args[:2]
            non_blocking = bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            return self._copy_into(operator, to, source, non_blocking)
        source, device = args[0], kwargs.get("device")
        own = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
        non_blocking = bool(kwargs.get("non_blocking"))
        if not isinstance(source, SimulatedTensor):
            self._upload(source, non_blocking)
            if self.shape and source.numel() > values.SMALL:
                inner = values.without(source, own.get("dtype"))
            else:
                inner = operator.function(source.detach(), **own)
                if inner.untyped_storage()._cdata == source.untyped_storage()._cdata:
                    inner = inner.clone()
            made = self.wrap(inner)
            self._touch([], [made.inner])
            return made
        if device is None or torch.device(device).type == "cuda":
            return self._compute(operator, args, own, [source], [])
        # As torch has it: a non-blocking copy to RAM goes into pinned memory.
        to = torch.empty(source.shape, dtype=own.get("dtype") or source.dtype, pin_memory=non_blocking)
        self._download(to, source, non_blocking)
        return to

    def _copy_into(self, operator: Operator, to: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        if not isinstance(to, SimulatedTensor):
            assert isinstance(source, SimulatedTensor)
            self._download(to, source, non_blocking)
        elif not isinstance(source, SimulatedTensor):
            self._upload(source, non_blocking)
            if not to.inner.is_meta:
                to.inner.copy_(source)
            self._touch([], [to.inner])
        else:
            self._compute(operator, (to, source), {}, [source], [to])
        return to

    def _upload(self, source: Tensor, non_blocking: bool) -> None:
        size, pinned = source.numel() * source.element_size(), source.is_pinned()
        self.rules.uploaded(size, pinned, non_blocking)
        self.accounts.copied(uploads=size)
        if not (non_blocking and pinned):
            self._wait("a copy from RAM")
        elif not self.shape:
            self.timeline.upload(source.detach())

    def _download(self, to: Tensor, source: SimulatedTensor, non_blocking: bool) -> None:
        self._touch([source.inner], [])
        self.accounts.copied(downloads=source.numel() * source.element_size())
        if source.inner.is_meta:
            values.fill(to, "")
        elif non_blocking and to.is_pinned():
            self.timeline.download(to.detach(), source.inner.expand_as(to).to(to.dtype))
        else:
            to.detach().copy_(source.inner)
        if not (non_blocking and to.is_pinned()):
            self._wait("a copy to RAM")

    def _wait(self, kind: str) -> None:
        """The host waits for the current stream."""
        self.waited(kind)
        self.timeline.wait(self.timeline.clocks[self.timeline.current])


def _run(function: OpOverload, name: str, args: Any, kwargs: dict[str, Any], written: list[Tensor]) -> Any:
    return function(*args, **kwargs)
