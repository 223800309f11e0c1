"""What torch.cuda says of the simulated device, and attention as a device computes it."""

from types import SimpleNamespace
from typing import Any

import torch
from simulated_gpu.accounting import kind_of
from simulated_gpu.device import CUDA, Device, SimulatedTensor
from simulated_gpu.streams import stand_ins
from torch import Tensor
from torch.autograd import Function

NAME = "simulated"
CAPABILITY = (9, 0)
_PROCESSORS = 132


class CUDAGraph:
    """A graph replays kernels without the program; here there is nothing but the program."""

    def __init__(self, *_: Any, **__: Any):
        raise RuntimeError("the simulated device captures no graphs; ask the backend for its steps without one")


def patch(device: Device) -> None:
    """Puts the stand-ins into torch."""
    # Module.to() leaves a parameter's object alone then, as it does between real devices.
    torch.__future__.set_swap_module_params_on_conversion(True)
    kinds = stand_ins(device.timeline, device.waited)
    own = _Answers(device, kinds)
    for name in (n for n in dir(_Answers) if not n.startswith("_")):
        setattr(torch.cuda, name, getattr(own, name))
    for name, kind in kinds.items():
        setattr(torch.cuda, name, kind)
    module: Any = torch.cuda
    module.stream, module.CUDAGraph, module.graph = kinds["StreamContext"], CUDAGraph, CUDAGraph
    module._lazy_init, module._initialized = lambda: None, True
    pageable = torch.Tensor.record_stream

    def record_stream(tensor: Tensor, stream: Any) -> None:
        (SimulatedTensor.record_stream if isinstance(tensor, SimulatedTensor) else pageable)(tensor, stream)

    torch.Tensor.record_stream = record_stream  # type: ignore[method-assign]
    _attend(device)


class _Answers:
    """Functions of torch.cuda, by their names there."""

    def __init__(self, device: Device, kinds: dict[str, type]):
        self._device, self._kinds = device, kinds

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def is_bf16_supported(self, *_: Any, **__: Any) -> bool:
        return True

    def is_current_stream_capturing(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, _: Any) -> None:
        pass

    def get_device_name(self, *_: Any) -> str:
        return NAME

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return CAPABILITY

    def get_device_properties(self, *_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            name=NAME, total_memory=self._device.total, multi_processor_count=_PROCESSORS,
            major=CAPABILITY[0], minor=CAPABILITY[1],
        )  # fmt: skip

    def current_stream(self, *_: Any) -> Any:
        return self._kinds["Stream"](number=self._device.timeline.current)

    def default_stream(self, *_: Any) -> Any:
        return self._kinds["Stream"](number=0)

    def set_stream(self, stream: Any) -> None:
        self._device.timeline.current = stream.number

    def synchronize(self, *_: Any) -> None:
        self._device.waited("synchronize")
        self._device.timeline.wait_for_all()

    def empty_cache(self) -> None:
        self._device.memory.reserved = self._device.memory.live

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        return self._device.total - self._device.memory.reserved, self._device.total

    def memory_allocated(self, *_: Any) -> int:
        return self._device.memory.live

    def memory_reserved(self, *_: Any) -> int:
        return self._device.memory.reserved

    def max_memory_allocated(self, *_: Any) -> int:
        return self._device.memory.peak

    def max_memory_reserved(self, *_: Any) -> int:
        return self._device.memory.peak

    def reset_peak_memory_stats(self, *_: Any) -> None:
        self._device.memory.peak = self._device.memory.live

    def memory_stats(self, *_: Any) -> dict[str, int]:
        memory = self._device.memory
        return {"allocated_bytes.all.current": memory.live, "allocated_bytes.all.peak": memory.peak}

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get_rng_state(self, *_: Any, **__: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)


def _attend(device: Device) -> None:
    """Attention without values is one kernel that keeps no scores, as on a device with flash attention."""
    plain = torch.nn.functional.scaled_dot_product_attention

    class Flash(Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
            out = torch.empty_like(query)
            sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=CUDA)
            ctx.save_for_backward(query, key, value, out, sums)
            ctx.flop = 4.0 * query.numel() * key.shape[2] / (2 if causal and query.shape[2] > 1 else 1)
            count(query, ctx.flop, query.nbytes + key.nbytes + value.nbytes, out.nbytes)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            query, key, value, out, _ = ctx.saved_tensors
            # Scores are computed again: five products in the place of two.
            read = 3 * query.nbytes + out.nbytes + key.nbytes + value.nbytes
            count(query, 2.5 * ctx.flop, read, query.nbytes + key.nbytes + value.nbytes)
            return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None

    def count(query: Tensor, flop: float, read: float, written: float) -> None:
        device.accounts.launched("attention", 1, read, written, {kind_of(query.dtype): flop})

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
                  is_causal: bool = False, **options: Any) -> Tensor:  # fmt: skip
        if not device.shape or not isinstance(query, SimulatedTensor):
            return plain(query, key, value, attn_mask, dropout_p, is_causal, **options)
        found: Tensor = Flash.apply(query, key, value, is_causal)
        return found

    torch.nn.functional.scaled_dot_product_attention = attention
