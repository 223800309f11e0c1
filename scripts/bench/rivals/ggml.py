"""llama.cpp's own quantizers with an importance matrix, called in the library that a Python package carries.

The types and their sizes are ggml's; that the matrix is the mean square of each input channel is llama-imatrix's.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import metadata
from math import lcm
from typing import Any

import numpy as np
import torch
from ground import Ground, Made, Rival
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lbllm_cli.core import files
from lbllm_cli.models.block import Block
from lbllm_cli.pipeline.streams import advance, embed_stream

# name -> number of ggml's type, bytes of a block of 256 weights.
TYPES = {
    "Q2_K": (10, 84),
    "IQ2_XXS": (16, 66),
    "IQ2_XS": (17, 74),
    "IQ2_S": (22, 82),
    "IQ3_XXS": (18, 98),
    "Q3_K": (11, 110),
}
BLOCK = 256
# (weights [n, width], importance [width]) -> weights as they are decoded.
Quantizer = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]


@cache
def _library() -> Any:
    carried = metadata.files("pywhispercpp") or []
    library: Any = ctypes.CDLL(str(next(file.locate() for file in carried if file.name == "libggml-base.so")))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    return library


def quantized(kind: str, weights: NDArray[np.float32], importance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights [n, width] through one of ggml's types and back; width: a multiple of 256. importance: [width], not negative."""
    number, size = TYPES[kind]
    library, count = _library(), weights.size // BLOCK
    packed = np.zeros(count * size, dtype=np.uint8)
    values = np.empty_like(weights)
    library.ggml_quantize_init(number)
    addresses = [array.ctypes.data for array in (weights, packed, importance, values)]
    written = library.ggml_quantize_chunk(number, addresses[0], addresses[1], 0, *weights.shape, addresses[2])
    if written != packed.size:
        raise RuntimeError(f"{kind}: expected {packed.size} bytes, ggml wrote {written}")
    decode = getattr(library, "dequantize_row_" + kind.lower().replace("_k", "_K"))
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode.restype = None
    decode(addresses[1], addresses[3], weights.size)
    return values


def straddled(weight: Tensor, importance: Tensor, quantize: Quantizer) -> Tensor:
    """A linear whose width is no multiple of 256, quantized in blocks that go on from one row to the next.

    weight: float32 [out, in]; importance: [in]. As many rows as fill whole blocks are one row of the quantizer: 4 of width 576
    are 9 blocks. Raises ValueError where the last rows would not fill one.
    """
    rows, width = weight.shape
    joined = lcm(width, BLOCK) // width
    if rows % joined:
        raise ValueError(f"{rows} rows of {width} do not fill blocks of {BLOCK}: {joined} rows at a time do")
    flat = weight.reshape(rows // joined, joined * width).float().contiguous().numpy()
    tiled = importance.float().repeat(joined).contiguous().numpy()
    return torch.from_numpy(quantize(flat, tiled)).view(rows, width)


@contextmanager
def _summing(block: Block, sums: dict[str, Tensor]) -> Iterator[None]:
    """Adds up the squares of what a block's linears read: in-block name -> [in], the same for those that read the same."""

    def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + inputs[0].double().square().sum((0, 1))

    handles = [block.linear(unit[0]).register_forward_pre_hook(partial(add, unit[0])) for unit in block.units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def importance_matrix(ground: Ground) -> dict[str, Tensor]:
    """Mean square of every input channel over the calibration text, in full precision: full name of a weight -> [in].

    Kept in the benchmark's folder for the other types.
    """
    path = ground.out / "importance.safetensors"
    if path.exists():
        known: dict[str, Tensor] = load_file(path)
        return known
    model, batch_size = ground.model, ground.plan.recipe.runtime.batch_size
    stream = embed_stream(model, ground.calibration, None, batch_size)
    found: dict[str, Tensor] = {}
    for index in range(model.blocks):
        block, sums = model.block(index), dict[str, Tensor]()
        with _summing(block, sums):
            advance(block, stream, stream, model.device, batch_size)
        for unit in block.units:
            mean = (sums[unit[0]] / ground.calibration.numel()).float()
            found |= {f"{block.prefix}{name}.weight": mean.clone() for name in unit}
    files.write_atomic(path, lambda temporary: save_file(found, temporary))
    return found


def make(kind: str, ground: Ground) -> Made:
    """All block linears as one type."""
    model, importance = ground.model, importance_matrix(ground)
    weights: dict[str, Tensor] = {}
    for name in model.binarized_names:
        weights[name] = straddled(model.read([name])[name].float(), importance[name], partial(quantized, kind))
    odd = sorted({width for _, width in model.binarized_shapes if width % BLOCK})
    widths = " and ".join(map(str, odd))
    note = f"blocks of {BLOCK} straddle rows of {widths}: no GGUF file holds such a tensor, the bits are nominal"
    return Made(weights, note if odd else "")


RIVALS = {
    kind: Rival(8 * size / BLOCK, f"{size} bytes a block of {BLOCK}", partial(make, kind)) for kind, (_, size) in TYPES.items()
}
