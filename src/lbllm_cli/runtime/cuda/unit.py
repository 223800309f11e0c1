"""Linears that read one input, repacked for the kernels: one quantization and one product for all of them."""

from collections.abc import Callable, Sequence
from operator import is_
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lbllm_cli.format.group_sizes import whole_groups
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.runtime.attachments import meet
from lbllm_cli.runtime.cuda.activations import TYPES, QuantizerTables, quantize_activations, quantize_values
from lbllm_cli.runtime.cuda.gemm import gemm, gemm_quantized
from lbllm_cli.runtime.cuda.gemv import ROWS_MAX, VALUE_ROWS_MAX, gemv, gemv_quantized
from lbllm_cli.runtime.cuda.operators import INTERPRETED
from lbllm_cli.runtime.cuda.weights import CudaWeights, foldable
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.runtime.shared_input import once, plain

Made = TypeVar("Made")


class Derived(Generic[Made]):
    """What was worked out of some tensors, until one of them is another, or was changed in place."""

    def __init__(self, make: Callable[[], Made]):
        self.make = make
        self._of: list[Tensor] = []
        self._versions: list[int] = []
        self._made: list[Made] = []

    def of(self, tensors: Sequence[Tensor]) -> Made:
        """It, for these tensors. A change through `.data` is not noticed."""
        # A tensor of inference mode counts no changes, and refuses changes outside of it.
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        if versions != self._versions or not all(map(is_, tensors, self._of)):
            self._made = [self.make()]
            self._of, self._versions = list(tensors), versions
        return self._made[0]


class CudaUnit:
    """q, k and v of a block, say: their weights below each other in the kernels' layout, and their input's quantizer, if any.

    A `runtime.linear.Holder`. The linears' own codes are dropped; `packed` gives them back, bit for bit.
    """

    def __init__(self, linears: list[PackedLinear], quantizer: ActQuantizer | None):
        weights = [packed.packed() for packed in linears]
        self.linears = linears
        self.quantizer = quantizer
        self.weights = CudaWeights.of(weights, foldable(weights[0], _shared(quantizer, weights[0])))
        self._bias = Derived(self._joined_biases)
        self._tables = Derived(self._prepared_tables)
        for slot, packed in enumerate(linears):
            packed.repacked(self, slot)

    @property
    def bias(self) -> Tensor | None:
        """Biases of all linears as their modules have them now, float32 [sum of out]; None where there is none."""
        found = [packed.bias for packed in self.linears if packed.bias is not None]
        return self._bias.of(found) if found else None

    def _joined_biases(self) -> Tensor:
        outs = zip(self.linears, self.weights.outs, strict=True)
        nothing = self.weights.scale
        parts = [nothing.new_zeros(out) if packed.bias is None else packed.bias.detach() for packed, out in outs]
        return torch.cat([part.float() for part in parts])

    @property
    def tables(self) -> QuantizerTables | None:
        """Of the quantizer as it is now; None where there is none, or it is switched off: inputs stay in full precision then."""
        if self.quantizer is None or not self.quantizer.enabled:
            return None
        return self._tables.of(list(self.quantizer.buffers()))

    def _prepared_tables(self) -> QuantizerTables:
        assert self.quantizer is not None
        return QuantizerTables.of(self.quantizer.tables)

    @property
    def device(self) -> torch.device:
        """Of its words."""
        return self.weights.words.device

    def runs_on(self, device: torch.device) -> bool:
        """Where its weights lie."""
        return device == self.device

    def packed(self, slot: int) -> PackedWeight:
        """The weights of a linear, as its checkpoint has them."""
        return self.weights.packed(slot)

    def output(self, slot: int, x: Tensor) -> Tensor:
        """Output of one of the linears: [..., in] -> [..., out]. Of a shared input all are computed at once."""
        tensor = plain(x)
        learns = tensor.requires_grad and torch.is_grad_enabled()
        if learns or torch.compiler.is_compiling() or tensor.dtype not in TYPES or not self.runs_on(tensor.device):
            return self._in_torch(slot, x)
        # Each is handed out once: whoever has it may write to it.
        part = once(x, self, self._parts).pop(slot, None)
        return self._parts(tensor)[slot] if part is None else part

    def _in_torch(self, slot: int, x: Tensor) -> Tensor:
        weight, bias = self.packed(slot).values().to(x.dtype), self.linears[slot].bias
        if self.quantizer is not None:
            meet(self.quantizer)
            x = self.quantizer(x)
        return linear(plain(x), weight, None if bias is None else bias.to(x.dtype))

    def _parts(self, x: Tensor) -> dict[int, Tensor]:
        return dict(enumerate(self.run(x).split(self.weights.outs, -1)))

    def run(self, x: Tensor) -> Tensor:
        """Outputs of all linears beside each other: [..., in] -> [..., sum of out], in the dtype of x."""
        weights, tables = self.weights, self.tables
        if x.shape[-1] != weights.in_features:
            raise ValueError(f"expected inputs of width {weights.in_features}, got {x.shape[-1]}")
        rows = x.detach().reshape(-1, weights.in_features).contiguous()
        out = rows.new_empty(len(rows), weights.rows)
        if tables is not None and self.quantizer is not None:
            meet(self.quantizer)
        if not len(rows):
            return out.view(*x.shape[:-1], weights.rows)
        if tables is not None and tables.in_bytes:
            self.linear_quantized(*self.quantized(rows, tables), out)
        else:
            self.linear_values(rows if tables is None else self._values(rows, tables), out)
        return out.view(*x.shape[:-1], weights.rows)

    def quantized(self, rows: Tensor, tables: QuantizerTables) -> tuple[Tensor, Tensor]:
        """T - Z int8 [rows, padded width] and steps float32, [rows, steps]."""
        assert self.quantizer is not None
        places = rows.new_empty(len(rows), self.weights.padded_width, dtype=torch.int8)
        step = rows.new_empty(len(rows), self.steps, dtype=torch.float32)
        quantize_activations(rows, tables, self.quantizer.size, places, step, self.quantizer.step_dtype)
        return places, step

    @property
    def sharing(self) -> int:
        """Groups of weights that share a step, 0 where all of a row do."""
        assert self.quantizer is not None
        return _shared(self.quantizer, self.weights)

    @property
    def steps(self) -> int:
        """Steps of a row of its input."""
        return -(-self.weights.groups // self.sharing) if self.sharing else 1

    def _values(self, rows: Tensor, tables: QuantizerTables) -> Tensor:
        """What the codes stand for: of 8 bits, which are no int8."""
        assert self.quantizer is not None
        values = torch.empty_like(rows)
        quantize_values(rows, tables, self.quantizer.size, values, self.quantizer.step_dtype)
        return values

    def linear_quantized(self, places: Tensor, step: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """All outputs of rows that are quantized already, biases added: see `gemv.gemv_quantized`. Any number of rows."""
        product = gemv_quantized if len(out) <= ROWS_MAX else gemm_quantized
        product(self.weights, places, step, self.sharing, out, residual, self.bias)

    def linear_values(self, rows: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """The same of rows in full precision, [rows, in]."""
        product = gemv if len(out) <= VALUE_ROWS_MAX else gemm
        product(self.weights, rows, out, residual, self.bias)


def _shared(quantizer: ActQuantizer | None, weights: PackedWeight | CudaWeights) -> int:
    """Groups of weights that share a step of their input; 0 where all of a row do, or none is quantized."""
    if quantizer is None or quantizer.size >= weights.in_features:
        return 0
    return quantizer.size // weights.group_size


def usable(linears: list[PackedLinear], quantizer: ActQuantizer | None) -> bool:
    """Whether the kernels can run them."""
    device, first = linears[0].weight.device, linears[0]
    if any(packed.weight.device != device for packed in linears) or not (device.type == "cuda" or INTERPRETED):
        return False
    return quantizer is None or whole_groups(quantizer.size, first.group_size, first.in_features)


def unit_of(linears: list[PackedLinear], quantizer: ActQuantizer | None) -> CudaUnit | None:
    """Leaves linears that read one input, and its quantizer, to the kernels; None where they cannot run them."""
    return CudaUnit(linears, quantizer) if usable(linears, quantizer) else None
