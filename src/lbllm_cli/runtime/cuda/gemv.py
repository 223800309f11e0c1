"""Decode: products of packed weights with one to eight rows of activations."""

from torch import Tensor

from lbllm_cli.runtime.cuda.weights import CudaWeights


def gemv_quantized(weights: CudaWeights, places: Tensor, step: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
    """All outputs of quantized rows, without biases, into `out`.

    places: int8 [rows, weights.padded_width], T - Z in the order of columns, 0 behind a ragged end. step: float32 [rows, groups],
    or [rows, 1] where all of a row share one. out: [rows, weights.rows], bfloat16, float16 or float32. residual: added, of out's
    shape and dtype; may be `out` itself. 1 to 8 rows.
    """
    raise NotImplementedError
