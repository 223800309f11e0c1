"""NVIDIA GPUs: kernels in Triton where they can run, torch elsewhere."""

import os
from functools import cache
from typing import Any

from torch import Tensor, nn

from lbllm_cli.core.errors import reason
from lbllm_cli.format.activations import Tables
from lbllm_cli.runtime.linear import Holder, PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.runtime.stage_kernels import StageKernels
from lbllm_cli.runtime.torch.backend import TorchBackend
from lbllm_cli.runtime.units import Units

_VARIABLE = "LBLLM_KERNELS"
# Ampere is the first to have what the kernels are made of: products of matrices in bfloat16 and in int8.
_CAPABILITY = (8, 0)
_TRITON = (3, 7)
_INSTEAD = "models and stages run in torch, many times slower"


class CudaBackend(TorchBackend):
    """A `runtime.backend.Backend`. The environment variable LBLLM_KERNELS=off leaves everything to torch."""

    @property
    def runs(self) -> bool:
        """Whether kernels can run on every GPU that is there; where they cannot, it is said once."""
        return os.environ.get(_VARIABLE) != "off" and _has_triton() and all(map(self._able, range(self.count())))

    def _able(self, index: int) -> bool:
        capability = self._module.get_device_capability(index)
        return capability >= _CAPABILITY or _say_unable(index, capability)

    @property
    def kernels(self) -> StageKernels | None:
        """In Triton."""
        return _stage_kernels() if self.runs else None

    def records(self, x: Tensor, tables: Tables, size: int) -> Tensor:
        """In one launch, where codes have 4 bits."""
        if not self.runs:
            return super().records(x, tables, size)
        from lbllm_cli.runtime.cuda.prompts import write_records  # it imports Triton
        from lbllm_cli.runtime.cuda.records import RecordTables, recordable

        if not recordable(tables, size):
            return super().records(x, tables, size)
        return write_records(x, RecordTables.of(tables, size))

    def hold(self, linears: list[PackedLinear], quantizer: ActQuantizer | None) -> Holder | None:
        """By the kernels where they have them."""
        if not self.runs:
            return None
        from lbllm_cli.runtime.cuda.unit import unit_of  # it imports Triton

        return unit_of(linears, quantizer)

    def take_over(self, model: nn.Module, units: Units, quantized: bool) -> list[Any]:
        """Linears, the decoder's decode steps and the head, where the kernels have them."""
        if not self.runs:
            return []
        from lbllm_cli.runtime.cuda.take_over import take_over  # it imports Triton

        return take_over(model, units, quantized)


@cache
def _has_triton() -> bool:
    try:
        import triton

        # Compilers before that do not take all kernels: 3.6 not prompts in groups of 16 on capability 9.0, 3.5 not the first one
        # of `ptq`.
        found = triton.__version__
        able = tuple(int(part) for part in found.split(".")[:2]) >= _TRITON
    except Exception as error:  # of any kind: it looks for drivers and compilers
        found, able = reason(error), False
    if not able:
        wanted = ".".join(map(str, _TRITON))
        remedy = f"run: pip install --upgrade torch 'triton>={wanted}'"
        _say(f"GPU kernels need Triton {wanted} or newer, got {found}; {remedy}. Until then {_INSTEAD}")
    return able


@cache
def _say_unable(index: int, capability: tuple[int, int]) -> bool:
    """False, once said."""
    expected, got = (".".join(map(str, numbers)) for numbers in (_CAPABILITY, capability))
    _say(
        f"GPU kernels need compute capability {expected}, cuda:{index} has {got}; set CUDA_VISIBLE_DEVICES to newer GPUs alone. "
        f"Until then {_INSTEAD}"
    )
    return False


@cache
def _stage_kernels() -> StageKernels:
    from lbllm_cli.runtime.cuda.stage.kernels import TritonKernels  # it imports Triton

    return TritonKernels()


def _say(text: str) -> None:
    from lbllm_cli.core.console import say  # it brings what loading an export can do without

    say(text)


def make(kind: str) -> CudaBackend:
    """The backend of NVIDIA GPUs."""
    return CudaBackend(kind)
