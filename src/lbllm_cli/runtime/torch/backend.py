"""torch on any device, and what it says of a device that is not the CPU."""

from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.format.activations import Quantized, Tables
from lbllm_cli.runtime.stage_kernels import StageKernels
from lbllm_cli.runtime.torch import quantizer
from lbllm_cli.runtime.units import Units


class TorchBackend:
    """A `runtime.backend.Backend`. kind: of device, for example "cuda"."""

    shares_ram = False
    piece: int | None = None
    usual_dtype: torch.dtype | None = None
    scatters = False

    def __init__(self, kind: str):
        self.kind = kind

    @property
    def kernels(self) -> StageKernels | None:
        """None."""
        return None

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.kind)

    def count(self) -> int:
        """Devices that torch sees."""
        return int(self._module.device_count()) if self._module.is_available() else 0

    def describe(self, device: torch.device) -> str:
        """The driver's name of it."""
        return str(self._module.get_device_name(device))

    def free_memory(self, device: torch.device) -> int:
        """What the driver says."""
        return int(self._module.mem_get_info(device)[0])

    def peak_memory(self, device: torch.device) -> int | None:
        """What torch has allocated at most."""
        return int(self._module.max_memory_allocated(device))

    def staged(self, tensor: Tensor) -> Tensor:
        """In pinned memory."""
        return tensor.pin_memory()

    def check(self) -> None:
        """It has no settings."""

    def quantized(self, x: Tensor, tables: Tables, step_dtype: torch.dtype) -> Quantized:
        """The reference itself."""
        return quantizer.quantized(x, tables, step_dtype)

    def gradients(
        self, x: Tensor, tables: Tables, found: Quantized, gradient: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The reference itself."""
        return quantizer.gradients(x, tables, found, gradient, wanted)

    def take_over(self, model: nn.Module, units: Units, quantized: bool) -> list[Any]:
        """Nothing: linears decode their weights as they run."""
        return []


def make(kind: str) -> TorchBackend:
    """The backend of a kind of device."""
    return TorchBackend(kind)
