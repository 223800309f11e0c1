"""Embedding and head in 8 bits in vLLM: loaded as they are stored, then vLLM's own in the model's dtype."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs

from lbllm_cli.format.names import ROW_SCALE
from lbllm_cli.format.rows import dequantize_rows
from lbllm_cli.vllm.linear import Loaded


class PackedRowsMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """An embedding's or a head's part of this process, int8 [rows, width] and a float16 scale for each row.

    Raises ValueError naming what the export does not have.
    """

    supports_pre_processed_weights = False

    def __init__(self, prefix: str):
        self.prefix, self.loaded = prefix, Loaded()
        self._dtype = torch.float32
        self._source: nn.Module | None = None

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **attributes: Any,
    ) -> None:  # fmt: skip
        """Room for what is stored. vLLM's loader takes this process's rows, and zeros behind the last."""
        rows, load = sum(output_partition_sizes), attributes.pop("weight_loader")
        self._dtype = params_dtype
        room = {
            "weight": torch.zeros(rows, input_size_per_partition, dtype=torch.int8),
            ROW_SCALE: torch.zeros(rows, dtype=torch.float16),
        }
        for part, tensor in room.items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            set_weight_attrs(parameter, {"output_dim": 0, "weight_loader": self.loaded.noting(part, load), **attributes})
            layer.register_parameter(part, parameter)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """The head has what the embedding has; nothing is loaded for it."""
        self._source = embed_tokens
        del layer.weight, layer.scale
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """The weight in the model's dtype, once however often vLLM asks."""
        if self._source is not None:
            method: Any = self._source.quant_method
            method.process_weights_after_loading(self._source)
            layer.register_parameter("weight", self._source.weight)  # type: ignore[arg-type]
        elif ROW_SCALE in layer._parameters:
            self.loaded.check({"weight": 1, ROW_SCALE: 1}, self.prefix)
            codes, scale = (layer.get_parameter(part).data for part in ("weight", ROW_SCALE))
            del layer.weight, layer.scale
            layer.register_parameter("weight", nn.Parameter(dequantize_rows(codes, scale, self._dtype), requires_grad=False))
        super().process_weights_after_loading(layer)
