"""The CPU: the compiled library where it has what is wanted, torch elsewhere."""

import platform
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.core.ram import available_ram
from lbllm_cli.engine.abi import library
from lbllm_cli.format import kv_record
from lbllm_cli.format.activations import Quantized, Tables
from lbllm_cli.format.names import input_name
from lbllm_cli.runtime.attachments import share_inputs
from lbllm_cli.runtime.cpu.block import BlockStep, steppable
from lbllm_cli.runtime.cpu.head import HeadLinear
from lbllm_cli.runtime.cpu.quantizer import native_gradients, native_quantized
from lbllm_cli.runtime.cpu.unit import Unit, usable
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.notices import say_layer_by_layer
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.runtime.stage_kernels import StageKernels
from lbllm_cli.runtime.torch import quantizer
from lbllm_cli.runtime.torch.transfer import Transfers
from lbllm_cli.runtime.units import Units


class CpuBackend:
    """A `runtime.backend.Backend`."""

    shares_ram = True
    # What stays in a processor's cache: 1,024 x 1,536 values in 40 ms of one core instead of 70.
    piece: int | None = 1 << 18
    # Every 16-bit value is exact in float32, and CPUs without bfloat16 units are slower in 16 bits.
    usual_dtype: torch.dtype | None = torch.float32
    scatters = True
    kernels: StageKernels | None = None

    def count(self) -> int:
        """There is always one."""
        return 1

    def absence(self) -> str:
        """There is always one."""
        return ""

    def warn_of_kinds(self, key: str) -> None:
        """There is one kind."""

    def describe(self, device: torch.device) -> str:
        """What the system calls it."""
        return platform.processor() or "cpu"

    def identity(self, device: torch.device) -> str | None:
        """Processes share it."""
        return None

    def free_memory(self, device: torch.device) -> int:
        """What can be had without swapping."""
        return available_ram()

    def peak_memory(self, device: torch.device) -> int | None:
        """None: it is the process's."""
        return None

    def transfers(self, device: torch.device) -> Transfers | None:
        """None: its memory is RAM."""
        return None

    def check(self) -> None:
        """Raises UsageError as `library`: for what LBLLM_KERNELS asks for."""
        library()

    def quantized(self, x: Tensor, tables: Tables, step_dtype: torch.dtype) -> Quantized:
        """By the library where it has the quantizer."""
        found = native_quantized(x, tables, step_dtype)
        return quantizer.quantized(x, tables, step_dtype, self.piece) if found is None else found

    def gradients(
        self, x: Tensor, tables: Tables, found: Quantized, gradient: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """By the library where it has the quantizer."""
        native = native_gradients(x, tables, found, gradient, wanted)
        return quantizer.gradients(x, tables, found, gradient, wanted) if native is None else native

    def records(self, x: Tensor, tables: Tables, size: int) -> Tensor:
        """Piece by piece."""
        return kv_record.write_record(x, tables, size, self.piece)

    def hold(self, linears: list[PackedLinear], quantizer: ActQuantizer | None) -> Unit | None:
        """By the library where it has them."""
        return Unit(linears, quantizer) if library() is not None and usable(linears, quantizer) else None

    def take_over(self, model: nn.Module, units: Units, quantized: bool) -> list[Any]:
        """Linears, decode steps and the head, where the library has them."""
        if library() is None:
            return []
        whole: Any = model
        handles = []
        layers = whole.get_decoder().layers
        for layer in layers:
            handles += self._take_over_layer(layer, units, quantized)
        if quantized and not any("forward" in vars(layer) for layer in layers):
            say_layer_by_layer(type(layers[0]).__name__)
        head = whole.get_output_embeddings()
        if type(head) is nn.Linear and head.bias is None:
            whole.set_output_embeddings(HeadLinear.of(head))
        steps = [layer.forward for layer in layers if isinstance(vars(layer).get("forward"), BlockStep)]
        # Here alone: it brings pydantic, and a training step is measured where that is not installed.
        from lbllm_cli.runtime.cpu.generate import NativeGenerate, generates

        if len(steps) == len(layers) and generates(whole):
            whole.generate = NativeGenerate(whole, steps)
            handles.append(whole.generate)
        return handles

    def _take_over_layer(self, layer: Any, units: Units, quantized: bool) -> list[Any]:
        handles = [] if quantized else share_inputs(layer, units)
        taken = []
        for names in units:
            by = layer.get_submodule(input_name(names)) if quantized else None
            if unit := self.hold([layer.get_submodule(name) for name in names], by):
                taken.append(unit)
        if quantized and len(taken) == len(units) and steppable(layer, units):
            layer.forward = BlockStep(layer, taken)
        return handles


def make(kind: str) -> CpuBackend:
    """The backend of the CPU."""
    return CpuBackend()
