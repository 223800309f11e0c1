"""Packed experts in vLLM: each expert's linears are the runtime's own, one after another over the tokens that chose it."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform

from lbllm_cli.format.activations import ActivationFormat
from lbllm_cli.format.names import TENSORS
from lbllm_cli.format.weights import PARTS
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.checks import check_values
from lbllm_cli.runtime.experts import expert_of
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import empty_quantizer
from lbllm_cli.vllm.linear import Loaded, add_quantizer, quantizer_parts

# What all experts of a block read is quantized by one of each, `gate_proj_input` and `down_proj_input` in the export. They are
# renamed as they come (`config`): vLLM takes what begins with the name of a linear for one.
_INPUTS = ("gate_input", "down_input")
# How names of the export's linears of an expert end that vLLM keeps in one tensor.
_LINEARS = {"w13": (".gate_proj", ".up_proj"), "w2": (".down_proj",)}


class PackedExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of a block. layout: of activations as they are stored, None where there are none; active: whether it counts."""

    def __init__(self, config: Any, prefix: str, moe: Any, layout: ActivationFormat | None, active: bool):
        super().__init__(moe)
        self.config, self.prefix, self.layout, self.active = config, prefix, layout, active
        self.loaded = Loaded()

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """None: no kernel of vLLM's is taken."""
        return None

    def create_weights(
        self, layer: nn.Module, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra: Any
    ) -> None:  # fmt: skip
        """Every expert's parts, gate and up below each other. Raises ValueError naming what vLLM asks for and this has not."""
        its: Any = layer
        parallel = self.moe.moe_parallel_config
        if current_platform.is_cuda_alike() and not get_current_vllm_config().model_config.enforce_eager:
            # The host reads which experts tokens have chosen; while a graph is captured it can read nothing.
            raise ValueError(f"{self.prefix}: packed experts in vLLM have no CUDA graphs; give it --enforce-eager")
        for name, found in (
            ("experts in parallel", parallel.use_ep or parallel.tp_size > 1),
            ("biases of experts", self.moe.has_bias),
            (f"activation {its.activation}", its.activation != MoEActivation.SILU),
            ("router weights on inputs", its.apply_router_weight_on_input),
        ):
            if found:
                raise ValueError(f"{self.prefix}: packed experts in vLLM have no {name}; take: lbllm serve --engine transformers")
        inner = intermediate_size_per_partition
        linears = [name for name in self.config.linears if expert_of(name) is not None]
        sizes = {
            name: self.config.group_size(self.prefix, [found for found in linears if found.endswith(ends)])
            for name, ends in _LINEARS.items()
        }
        self.shapes = {"w13": (hidden_size, 2 * inner, sizes["w13"]), "w2": (inner, hidden_size, sizes["w2"])}
        self.experts = num_experts
        for name, shape in self.shapes.items():
            empty = PackedLinear(*shape, bias=False, level_bits=self.config.level_bits)
            for part in PARTS:
                tensor = getattr(empty, part)
                stored = nn.Parameter(tensor.new_zeros(num_experts, *tensor.shape), requires_grad=False)
                stored.weight_loader = self.loaded.noting(f"{name}_{part}", _place)  # type: ignore[attr-defined]
                layer.register_parameter(f"{name}_{part}", stored)
        if self.layout is not None:
            for name, (width, *_) in zip(_INPUTS, self.shapes.values(), strict=True):
                add_quantizer(layer, name, empty_quantizer(self.layout, name, width), self.loaded)
        plain = its.load_weights
        its.load_weights = lambda weights: _load(layer, plain, weights)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leaves each expert to kernels where they have it. Raises ValueError naming what was not loaded, or has no meaning."""
        expected = {f"{name}_{part}": self.experts * (2 if name == "w13" else 1) for name in self.shapes for part in PARTS}
        for name in _INPUTS if self.layout is not None else ():
            expected |= quantizer_parts(name)
        self.loaded.check(expected, self.prefix)
        its: Any = layer
        quantizers = [getattr(layer, name) if self.active else None for name in _INPUTS]
        its.packed = nn.ModuleDict()
        for name, shape in self.shapes.items():
            its.packed[name] = nn.ModuleList()
            for expert in range(self.experts):
                packed = PackedLinear(*shape, bias=False, level_bits=self.config.level_bits)
                for part in PARTS:
                    setattr(packed, part, getattr(layer, f"{name}_{part}").data[expert])
                its.packed[name].append(packed)
            for part in PARTS:
                delattr(layer, f"{name}_{part}")
        # Before kernels get them, which trust tables.
        check_values(layer, self.prefix)
        for held, quantizer in zip(its.packed.values(), quantizers, strict=True):
            for packed in held:
                backend_of(packed.weight.device).hold([packed], quantizer)
        self.quantizers = quantizers

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any, shared_experts_input: Any
    ) -> Tensor:
        """x: [tokens, hidden]. topk_weights, topk_ids: [tokens, chosen] -> [tokens, hidden]."""
        out = torch.zeros_like(x)
        for expert in topk_ids.unique().tolist():
            rows, place = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = self._linear(layer, "w13", expert, x[rows]).chunk(2, -1)
            found = self._linear(layer, "w2", expert, torch.nn.functional.silu(gate) * up)
            out.index_add_(0, rows, found * topk_weights[rows, place].unsqueeze(1).to(found.dtype))
        return out

    def _linear(self, layer: Any, name: str, expert: int, x: Tensor) -> Tensor:
        packed, quantizer = layer.packed[name][expert], self.quantizers[list(self.shapes).index(name)]
        return packed(x if quantizer is None or packed.unit is not None else quantizer(x))


def _place(
    param: Tensor, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int, return_success: bool = False
) -> bool | None:
    """One part of one expert's linear to its place: gate above up."""
    target = param[expert_id]
    if shard_id in ("w1", "w3"):
        target = target.chunk(2)[0 if shard_id == "w1" else 1]
    if target.shape != loaded_weight.shape or target.dtype != loaded_weight.dtype:
        expected, got = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (target, loaded_weight))
        raise ValueError(f"{weight_name}: expected {expected}, got {got}; export it again")
    target.copy_(loaded_weight)
    return True if return_success else None


def _load(layer: nn.Module, plain: Any, weights: Any) -> Any:
    """vLLM's own loading of experts, but for quantizers, which are nobody's of them."""
    others = []
    for name, stored in weights:
        owner, _, part = name.rpartition(".")
        if owner in _INPUTS and part in TENSORS:
            buffer = getattr(layer.get_submodule(owner), part)
            buffer.weight_loader(buffer, stored)
            yield name
        else:
            others.append((name, stored))
    yield from plain(others)
