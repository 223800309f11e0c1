"""torch on any device, and what it says of a device that is not the CPU."""

from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.core.errors import reason
from lbllm_cli.format import kv_record
from lbllm_cli.format.activations import Quantized, Tables
from lbllm_cli.runtime.linear import Holder, PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.runtime.stage_kernels import StageKernels
from lbllm_cli.runtime.torch import quantizer
from lbllm_cli.runtime.torch.transfer import Transfers
from lbllm_cli.runtime.units import Units


class TorchBackend:
    """A `runtime.backend.Backend`. kind: of device, for example "cuda"."""

    shares_ram = False
    piece: int | None = None
    usual_dtype: torch.dtype | None = None
    scatters = False

    def __init__(self, kind: str):
        self.kind = kind
        self._transfers: dict[int, Transfers] = {}

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

    def absence(self) -> str:
        """What stands in the way: a torch without CUDA has no reason to give, a driver that does not suit it has one."""
        if torch.version.cuda is None:
            return " (it is built without CUDA)" if self.kind == "cuda" else ""
        try:
            self._module.init()
        except (RuntimeError, AssertionError) as error:
            return f" ({reason(error)})"
        return ""

    def warn_of_kinds(self, key: str) -> None:
        """A run that goes on from another kind of device gives other last bits."""
        from lbllm_cli.core.console import say  # it brings what loading an export can do without

        names = [self.describe(torch.device(self.kind, index)) for index in range(self.count())]
        if len(set(names)) > 1:
            listed = ", ".join(f"{self.kind}:{index} {name}" for index, name in enumerate(names))
            say(f"GPUs of different kinds: {listed}; the first is taken, {key}: {self.kind}:N takes another")

    def describe(self, device: torch.device) -> str:
        """The driver's name of it."""
        return str(self._module.get_device_name(device))

    def identity(self, device: torch.device) -> str | None:
        """The driver's number of it; its place, where the driver has none."""
        return str(getattr(self._module.get_device_properties(device), "uuid", device))

    def free_memory(self, device: torch.device) -> int:
        """What the driver says, and what torch has had back and keeps: it takes from there first, and returns it when memory runs
        out. Without it a phase behind another one in the same process would find the card full.
        """
        pool = self._module.memory_reserved(device) - self._module.memory_allocated(device)
        return int(self._module.mem_get_info(device)[0]) + int(pool)

    def peak_memory(self, device: torch.device) -> int | None:
        """What torch has allocated at most."""
        return int(self._module.max_memory_allocated(device))

    def transfers(self, device: torch.device) -> Transfers | None:
        """Made once for each device."""
        index = device.index or 0
        if index not in self._transfers:
            self._transfers[index] = Transfers(self._module, device)
        return self._transfers[index]

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

    def records(self, x: Tensor, tables: Tables, size: int) -> Tensor:
        """The reference itself."""
        return kv_record.write_record(x, tables, size)

    def hold(self, linears: list[PackedLinear], quantizer: ActQuantizer | None) -> Holder | None:
        """None: linears decode their weights as they run."""
        return None

    def take_over(self, model: nn.Module, units: Units, quantized: bool) -> list[Any]:
        """Nothing."""
        return []


def make(kind: str) -> TorchBackend:
    """The backend of a kind of device."""
    return TorchBackend(kind)
