"""The one table of backends: what depends on the kind of device that tensors lie on.

A backend is a folder of its own with a module `backend`, whose `make(kind)` gives a `Backend`; it is imported when a device of
that kind is first used. Everything that computes without one is in `format` and in `runtime.torch`.
"""

import re
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lbllm_cli.core.errors import UsageError
from lbllm_cli.format.activations import Quantized, Tables
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.runtime.stage_kernels import StageKernels
from lbllm_cli.runtime.torch.transfer import Transfers
from lbllm_cli.runtime.units import Units

if TYPE_CHECKING:
    from lbllm_cli.runtime.linear import Holder, PackedLinear
    from lbllm_cli.runtime.quantizer import ActQuantizer

# Kind of device -> the module that makes its backend. What is not here runs in torch.
TABLE = {"cpu": "lbllm_cli.runtime.cpu.backend", "cuda": "lbllm_cli.runtime.cuda.backend"}
_OTHERS = "lbllm_cli.runtime.torch.backend"


class Backend(Protocol):
    """A kind of device.

    shares_ram: its memory is the process's. piece: values of a tensor that are best worked on at once, None for all. usual_dtype:
    what models are computed in where nobody says, None for what they are stored in. scatters: whether many values are added to
    few places at speed, and in the same order every time.
    """

    shares_ram: bool
    piece: int | None
    usual_dtype: torch.dtype | None
    scatters: bool

    @property
    def kernels(self) -> StageKernels | None:
        """Fused forms of what stages compute, None where there are none: they compute it in torch then."""

    def count(self) -> int:
        """Devices of this kind that this process can use."""

    def absence(self) -> str:
        """Why there are none, for messages: empty, or a text in brackets that begins with a space."""

    def warn_of_kinds(self, key: str) -> None:
        """Says where devices differ which one is taken. key: that chooses it."""

    def describe(self, device: torch.device) -> str:
        """Name of a device, for records."""

    def identity(self, device: torch.device) -> str | None:
        """What tells a device from all others of its machine; None where processes share it."""

    def free_memory(self, device: torch.device) -> int:
        """Bytes that can still be had."""

    def peak_memory(self, device: torch.device) -> int | None:
        """Most bytes that this process has had so far; None where the process's own peak says it."""

    def transfers(self, device: torch.device) -> Transfers | None:
        """Copies to and from a device that hold up nobody; None where there is nothing to copy."""

    def check(self) -> None:
        """Raises UsageError where its settings ask for what is not there."""

    def quantized(self, x: Tensor, tables: Tables, step_dtype: torch.dtype) -> Quantized:
        """Groups float [..., size] and their codes' values; see `runtime.torch.quantizer.quantized`."""

    def gradients(
        self, x: Tensor, tables: Tables, found: Quantized, gradient: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `runtime.torch.quantizer.gradients`."""

    def records(self, x: Tensor, tables: Tables, size: int) -> Tensor:
        """Keys or values as a cache keeps them; see `format.kv_record.write_record`."""

    def hold(self, linears: "list[PackedLinear]", quantizer: "ActQuantizer | None") -> "Holder | None":
        """Leaves linears that read one input, and its quantizer, to the kernels; None where they do not have them."""

    def take_over(self, model: nn.Module, units: Units, quantized: bool) -> list[Any]:
        """Hands what it computes faster of a loaded packed model over to it; returns handles that take hooks back.

        quantized: whether the model quantizes activations.
        """


@cache
def _made(kind: str) -> Backend:
    made: Backend = import_module(TABLE.get(kind, _OTHERS)).make(kind)
    return made


def backend_of(device: torch.device) -> Backend:
    """The backend of a device."""
    return _made(device.type)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of RAM on a device, for whoever computes there next."""
    transfers = backend_of(device).transfers(device)
    if transfers is None or tensor.device == device:
        return tensor.to(device)
    return transfers.upload(transfers.buffer(tuple(tensor.shape), tensor.dtype).copy_(tensor))


def weight_on(packed: PackedWeight, device: torch.device) -> PackedWeight:
    """A packed weight of RAM on a device."""
    return packed.moved(partial(on_device, device=device))


def in_ram(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of any devices in RAM, contiguous, in memory that the system has back when they are gone.

    One buffer of each size is pinned meanwhile: torch keeps what was pinned once, in powers of two of bytes, and the state of a
    training has several times a block.
    """
    found = {}
    for name, tensor in tensors.items():
        transfers = backend_of(tensor.device).transfers(tensor.device)
        if transfers is None:
            found[name] = tensor.detach().contiguous()
        else:
            landing = transfers.download(tensor.detach())
            found[name] = landing.wait().clone()
            transfers.release(landing.values)
    return found


def choose_device(wanted: str, key: str = "runtime.device", place: tuple[int, int] = (0, 1)) -> torch.device:
    """`auto` is the first GPU, else the CPU. key: what it stands under, for messages. place: of this process, among how many on
    this machine, each of which gets a GPU of its own.

    Raises UsageError for what is no device, and when a GPU is asked for that this machine has not.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", wanted):
        raise UsageError(f"{key} {wanted}: expected auto, cpu, cuda or cuda:N")
    count = _made("cuda").count()
    if wanted == "auto":
        wanted = "cuda" if count else "cpu"
    if wanted.startswith("cuda"):
        if not count:
            why = _made("cuda").absence()
            raise UsageError(f"{key} {wanted}: this torch sees no GPU{why}; set {key} to auto or cpu")
        if int(wanted.partition(":")[2] or 0) >= count:
            raise UsageError(f"{key} {wanted}: this torch sees {count} GPUs, the last is cuda:{count - 1}")
        if place[1] > 1:
            return _own_gpu(wanted, key, place, count)
        # What is launched, or asked for, without a device of its own goes to the present one.
        if ":" in wanted:
            torch.cuda.set_device(torch.device(wanted))
        if count > 1 and ":" not in wanted:
            _made("cuda").warn_of_kinds(key)
    return torch.device(wanted)


def _own_gpu(wanted: str, key: str, place: tuple[int, int], count: int) -> torch.device:
    """The GPU of one of several processes on this machine. count: of the GPUs that it sees, 1 where it was given one."""
    number, processes = place
    if ":" in wanted:
        raise UsageError(f"{key} {wanted} is one GPU, and {processes} processes run on this machine; set {key}: cuda")
    if 1 < count < processes:
        raise UsageError(f"{processes} processes run on this machine, which has {count} GPUs; start at most {count}")
    device = torch.device("cuda", 0 if count == 1 else number)
    # What is launched without a device of its own goes to the present one.
    torch.cuda.set_device(device)
    return device


def measured_peak() -> str:
    """What the GPU has held, for the message after its memory ran out; empty where none was used."""
    from lbllm_cli.core.console import GIB  # it brings what loading an export can do without

    backend = _made("cuda")
    if not backend.count() or not torch.cuda.is_initialized():
        return ""
    # The one that was chosen, see `choose_device`.
    device = torch.device("cuda", torch.cuda.current_device())
    peak, free = backend.peak_memory(device) or 0, backend.free_memory(device)
    return f" ({peak / GIB:.1f} GiB were allocated at most; {free / GIB:.1f} GiB are free, perhaps in pieces)"
