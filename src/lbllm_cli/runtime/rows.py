"""Embedding and head that a file has in 8 bits, while they are loaded; then the model's own modules have them again."""

from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.format.rows import dequantize_rows


class StoredRows(nn.Module):
    """Stands for an embedding or a head until its integers are loaded: `weight` int8 [rows, width], `scale` float16 [rows].

    original: the module whose weight they are.
    """

    scale: Tensor

    def __init__(self, original: nn.Embedding | nn.Linear):
        super().__init__()
        rows, width = original.weight.shape
        # A parameter: transformers ties a head to it as to any other.
        self.weight = nn.Parameter(torch.zeros(rows, width, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.zeros(rows, dtype=torch.float16))
        self._original, self._dtype = [original], original.weight.dtype

    def restored(self, model: Any) -> Any:
        """The module in whose place it is, with its weight. model: whose it is."""
        original = self._original[0]
        if next(original.buffers(), None) is not None:
            # Gemma's factor: transformers gives values to what is in a model while it loads it.
            original.to_empty(device=self.weight.device)
            model._init_weights(original)
        dense = dequantize_rows(self.weight, self.scale, self._dtype)
        original.weight = nn.Parameter(dense, requires_grad=False)
        return original


def stand_for_rows(model: Any) -> None:
    """Puts a `StoredRows` in the place of a model's embedding, and of its head where that has a weight of its own."""
    model.set_input_embeddings(StoredRows(model.get_input_embeddings()))
    if not model.config.get_text_config().tie_word_embeddings:
        model.set_output_embeddings(StoredRows(model.get_output_embeddings()))


def restore_rows(model: Any) -> None:
    """Gives a loaded model its own embedding and head back, tied if they were."""
    embedding = model.get_input_embeddings().restored(model)
    model.set_input_embeddings(embedding)
    head = model.get_output_embeddings()
    if isinstance(head, StoredRows):
        model.set_output_embeddings(head.restored(model))
    else:
        head.weight = embedding.weight
