"""Linears that read one input, repacked for the library: one quantization and one call for all of them."""

import weakref
from ctypes import byref
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lbllm_cli.engine import memory
from lbllm_cli.engine.abi import GROUP_MAX, LEVEL_GROUP, ROW_GROUP, Quantizer, Weights, library
from lbllm_cli.format.levels import per_row
from lbllm_cli.format.names import LEVELS
from lbllm_cli.format.weights import PackedWeight, group_count
from lbllm_cli.runtime.attachments import meet
from lbllm_cli.runtime.cpu.captured import CapturedQuantizers
from lbllm_cli.runtime.cpu.library import DTYPES, pointer, quantizer_struct, supported
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.runtime.shared_input import once, plain

# What the registered operator finds a unit by.
_UNITS: "weakref.WeakValueDictionary[int, Unit]" = weakref.WeakValueDictionary()


class Unit:
    """q, k and v of a block, say: their weights below each other in the library's layout, and their input's quantizer, if any.

    The linears' own codes are dropped; `packed` gives them back, bit for bit.
    """

    def __init__(self, linears: list[PackedLinear], quantizer: ActQuantizer | None):
        first = linears[0]
        self.in_features, self.group_size, self.level_bits = first.in_features, first.group_size, first.level_bits
        self.sizes = group_sizes(first, quantizer)
        self.outs = [linear.out_features for linear in linears]
        self.ends = list(accumulate(self.outs))
        self.linears = linears
        self.quantizer = quantizer
        self.tiles = _repacked(linears, self.sizes)
        self.bias = torch.zeros(self.ends[-1]) if any(x.bias is not None for x in linears) else None
        self._structs: tuple[tuple[Weights, Quantizer | None], CapturedQuantizers] | None = None
        for slot, packed in enumerate(linears):
            packed.repacked(self, slot)
        _UNITS[id(self)] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_structs": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A copied tensor lies where its allocator puts it.
        self.tiles = aligned(len(self.tiles)).copy_(self.tiles)
        _UNITS[id(self)] = self

    @property
    def structs(self) -> tuple[Weights, Quantizer | None]:
        """Weights and quantizer as the library reads them: the quantizer and biases as their modules have them now."""
        self.read_biases()
        if self._structs is None or not self._structs[1].hold():
            by = self.quantizer
            weights = Weights(pointer(self.tiles), pointer(self.bias), self.in_features, self.ends[-1], *self.sizes)
            struct = None if by is None else quantizer_struct(by.tables, by.size)
            self._structs = (weights, struct), CapturedQuantizers([] if by is None else [by])
        return self._structs[0]

    def read_biases(self) -> None:
        """Copies biases to where the library reads them: they may have been changed since they were loaded."""
        if self.bias is not None:
            for slot, packed in enumerate(self.linears):
                if packed.bias is not None:
                    self._part(self.bias, slot).copy_(packed.bias.detach())

    @property
    def device(self) -> torch.device:
        """Of its tiles."""
        return self.tiles.device

    def runs_on(self, device: torch.device) -> bool:
        """Its layout is the library's."""
        return device.type == "cpu"

    def packed(self, slot: int) -> PackedWeight:
        """The weights of a linear, as its checkpoint has them."""
        out, groups = self.outs[slot], group_count(self.in_features, self.group_size)
        weight = torch.empty(out, groups, self.group_size // 4, dtype=torch.uint8)
        levels, scale = torch.empty(out, groups, LEVELS, dtype=torch.int8), torch.empty(out, groups, dtype=torch.float16)
        library_ = _library()
        parts = (pointer(tensor) for tensor in (weight, levels, scale))
        library_.lbllm_unpack(byref(self.structs[0]), self.ends[slot] - out, out, *parts)
        return PackedWeight(weight, levels, scale, self.in_features, self.level_bits)

    def output(self, slot: int, x: Tensor) -> Tensor:
        """Output of one of the linears: [..., in] -> [..., out]. Of a shared input all are computed at once."""
        tensor = plain(x)
        floats = tensor.dtype in DTYPES or tensor.dtype == torch.float16
        learns = tensor.requires_grad and torch.is_grad_enabled()
        if learns or not floats or tensor.device.type != "cpu":
            return self._in_torch(slot, x)
        if torch.compiler.is_compiling():
            return self._part(torch.ops.lbllm.linear(tensor, id(self), self.ends[-1]), slot)
        # Each is handed out once: whoever has it may write to it.
        part = once(x, self, self._parts).pop(slot, None)
        return self._part(self.run(tensor), slot) if part is None else part

    def _in_torch(self, slot: int, x: Tensor) -> Tensor:
        weight, bias = self.packed(slot).values().to(x.dtype), self.linears[slot].bias
        if self.quantizer is not None:
            meet(self.quantizer)
            x = self.quantizer(x)
        return linear(plain(x), weight, None if bias is None else bias.to(x.dtype))

    def _parts(self, x: Tensor) -> dict[int, Tensor]:
        return dict(enumerate(self.run(x).split(self.outs, -1)))

    def run(self, x: Tensor) -> Tensor:
        """Outputs of all linears beside each other: [..., in] -> [..., sum of out]."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs of width {self.in_features}, got {x.shape[-1]}")
        if x.dtype not in DTYPES:
            return self.run(x.float()).to(x.dtype)
        x = x.detach().contiguous()
        y = x.new_empty(*x.shape[:-1], self.ends[-1])
        weights, struct = self.structs
        quantizer = None
        # Switched off, a quantizer leaves inputs in full precision: so does the library then.
        if struct is not None and self.quantizer is not None and self.quantizer.enabled:
            meet(self.quantizer)
            quantizer = byref(struct)
        rows, threads = x.numel() // self.in_features, torch.get_num_threads()
        _library().lbllm_linear(byref(weights), quantizer, pointer(x), pointer(y), DTYPES[x.dtype], rows, threads)
        return y

    def _part(self, y: Tensor, slot: int) -> Tensor:
        return y[..., self.ends[slot] - self.outs[slot] : self.ends[slot]]


def _library() -> Any:
    lib = library()
    assert lib is not None
    return lib


def group_sizes(first: PackedLinear, quantizer: ActQuantizer | None) -> tuple[int, int]:
    """Inputs of a group of the library's layout, and those that share levels, 0 where that is the same group.

    With a scale for each row, groups are as large as those that share a step.
    """
    if not per_row(first.level_bits):
        return first.group_size, 0
    return (ROW_GROUP if quantizer is None or quantizer.size >= first.in_features else quantizer.size), first.group_size


def _repacked(linears: list[PackedLinear], sizes: tuple[int, int]) -> Tensor:
    first, lib = linears[0], _library()
    each = [packed.packed() for packed in linears]
    parts = [torch.cat(tensors) for tensors in zip(*(packed.tensors for packed in each), strict=True)]
    shape = (first.in_features, len(parts[0]), *sizes)
    tiles = aligned(int(lib.lbllm_tiles_bytes(*shape)))
    lib.lbllm_pack(*map(pointer, parts), *shape, pointer(tiles), torch.get_num_threads())
    for packed in each:
        for tensor in packed.tensors:
            memory.page_out(tensor.data_ptr(), tensor.nbytes)
    return tiles


def aligned(size: int) -> Tensor:
    """uint8 [size]: see `memory.aligned`."""
    return torch.from_numpy(memory.aligned(size))


def usable(linears: list[PackedLinear], quantizer: ActQuantizer | None) -> bool:
    """Whether the library can run them."""
    first = linears[0]
    size, levels = group_sizes(first, quantizer)
    here = all(x.weight.device.type == "cpu" for x in linears) and size <= GROUP_MAX and not (levels and size % LEVEL_GROUP)
    if quantizer is None or not here:
        return here
    return supported(quantizer.tables) and (quantizer.size == size or quantizer.size >= first.in_features)


@torch.library.custom_op("lbllm::linear", mutates_args=())
def _linear(x: Tensor, unit: int, out_features: int) -> Tensor:
    return _UNITS[unit].run(x)


@_linear.register_fake
def _(x: Tensor, unit: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
