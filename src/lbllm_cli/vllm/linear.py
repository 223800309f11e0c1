"""Packed linears in vLLM: its parameters as they are loaded, then the runtime's own linear and kernels."""

from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter
from vllm.utils.torch_utils import direct_register_custom_op

from lbllm_cli.format.activations import ActivationFormat
from lbllm_cli.format.levels import per_row
from lbllm_cli.format.names import CENTRE, TENSORS
from lbllm_cli.format.weights import PARTS
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.checks import check_values
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer, empty_quantizer

# Operators live as long as it.
LIBRARY = Library("lbllm_vllm", "FRAGMENT")


class Loaded:
    """Counts what a layer was given: vLLM does not ask whether a tensor of a quantized model came at all."""

    def __init__(self) -> None:
        self.times: Counter[str] = Counter()

    def noting(self, part: str, load: Callable[..., Any]) -> Callable[..., Any]:
        """`load`, counted under `part`."""

        # By its signature vLLM finds the parameter, called `param`, that weights which are loaded again go to.
        @wraps(load)
        def loader(*args: Any, **kwargs: Any) -> Any:
            self.times[part] += 1
            return load(*args, **kwargs)

        return loader

    def check(self, expected: dict[str, int], owner: str) -> None:
        """Raises ValueError naming what came less often than expected; what is loaded again is counted from nothing."""
        missed = [part for part, times in expected.items() if self.times[part] < times]
        self.times.clear()
        if missed:
            raise ValueError(f"{owner}: the export has no {', '.join(missed)}; export it again")


def add_quantizer(layer: nn.Module, name: str, quantizer: ActQuantizer, loaded: Loaded) -> None:
    """Hangs a quantizer into a layer of vLLM; its tensors are counted under `<name>.<tensor>`."""
    for part, buffer in quantizer.named_buffers():
        fill: Any = _fill_heads if part == CENTRE else _fill
        # Not a parameter: it is stored once, whichever of the joined linears it came with.
        buffer.weight_loader = loaded.noting(f"{name}.{part}", fill)  # type: ignore[attr-defined]
    layer.add_module(name, quantizer)


def _fill(param: Tensor, stored: Tensor, *_: Any) -> None:
    if param.shape != stored.shape or param.dtype != stored.dtype:
        expected, got = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (param, stored))
        raise ValueError(f"a quantizer's tensor: expected {expected}, got {got}; export it again")
    param.copy_(stored)


def _fill_heads(param: Tensor, stored: Tensor, *_: Any) -> None:
    """The rows of this process's key heads: a share of them, or one that several processes have."""
    parts, heads = get_tensor_model_parallel_world_size(), len(stored)
    first = get_tensor_model_parallel_rank() * heads // parts
    _fill(param, stored[first : first + max(1, heads // parts)])


def quantizer_parts(name: str, parts: tuple[str, ...] = TENSORS) -> dict[str, int]:
    """What `add_quantizer` counts, once each."""
    return {f"{name}.{part}": 1 for part in parts}


@register_weight_loader_v2_supported_method
class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One linear of vLLM, which may stand for several of the export.

    names: of those, in a block. layout: of activations, None where they are in full precision.
    """

    def __init__(self, config: Any, prefix: str, names: list[str], layout: ActivationFormat | None):
        self.config, self.prefix, self.names, self.layout = config, prefix, names, layout
        self.loaded = Loaded()

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra: Any
    ) -> None:  # fmt: skip
        """Parameters with the names, shapes and dtypes of the export: rows are cut along axis 0, groups along axis 1.

        The scale of a row is that of all parts of its inputs. Raises ValueError where a part of the inputs is no whole number of
        groups, or of steps of activations.
        """
        size, own = self.config.group_size(self.prefix, self.names), input_size_per_partition
        cut = own != input_size
        whole = size if self.layout is None else lcm(size, self.layout.group_size)
        if cut and own % whole:
            raise ValueError(
                f"{self.prefix}: {input_size} inputs in {input_size // own} parts are {own} each, no whole number of groups of "
                f"{whole}; take a smaller --tensor-parallel-size"
            )
        if cut and self.layout is not None and self.layout.granularity == "token":
            raise ValueError(
                f"{self.prefix}: a step of activations stands for a whole token, whose inputs --tensor-parallel-size divides; "
                "take 1, or an export with act_calib.granularity group"
            )
        packed = PackedLinear(own, sum(output_partition_sizes), size, bias=False, level_bits=self.config.level_bits)
        for part in PARTS:
            load = self.loaded.noting(part, extra["weight_loader"])
            of_rows = part == PARTS[-1] and per_row(self.config.level_bits)
            form = ChannelQuantScaleParameter if of_rows else partial(ModelWeightParameter, input_dim=1)
            layer.register_parameter(part, form(data=getattr(packed, part), output_dim=0, weight_loader=load))
        if self.config.layout is not None:
            # The quantizer belongs to the first of the export's linears that read this input.
            add_quantizer(layer, "input", empty_quantizer(self.config.layout, f"{self.names[0]}.input", input_size), self.loaded)
        self.shape = own, sum(output_partition_sizes), size
        # What operators find a layer by: graphs are kept on disk, and another process has other addresses.
        get_current_vllm_config().compilation_config.static_forward_context[self.prefix] = layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leaves the weights to kernels where they have them.

        Raises ValueError naming what was not loaded, or what has no meaning: kernels trust tables.
        """
        quantizer: Any = getattr(layer, "input", None)
        expected = {part: len(self.names) for part in PARTS} | ({} if quantizer is None else quantizer_parts("input"))
        self.loaded.check(expected, self.prefix)
        packed = PackedLinear(*self.shape, bias=False, level_bits=self.config.level_bits)
        for part in PARTS:
            setattr(packed, part, getattr(layer, part).data)
            delattr(layer, part)
        if self.layout is None:
            quantizer = None
        layer.packed = packed
        check_values(layer, self.prefix)
        layer.quantizes = quantizer
        backend_of(packed.weight.device).hold([packed], quantizer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, in] -> [tokens, out]."""
        out = torch.ops.lbllm_vllm.linear(x, self.prefix, self.shape[1])
        return out if bias is None else out + bias


def _linear(x: Tensor, layer: str, out_features: int) -> Tensor:
    module = get_forward_context().no_compile_layers[layer]
    packed: PackedLinear = module.packed
    if packed.unit is None and module.quantizes is not None:
        x = module.quantizes(x)
    return packed(x)


def _linear_shape(x: Tensor, layer: str, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


direct_register_custom_op("linear", _linear, fake_impl=_linear_shape, target_lib=LIBRARY)
