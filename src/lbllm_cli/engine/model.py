"""A packed export in the compiled library: a call for the tokens that are new, no torch."""

from collections.abc import Sequence
from ctypes import byref, c_int32, c_uint64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lbllm_cli.engine import abi
from lbllm_cli.engine.blocks import Blocks
from lbllm_cli.engine.config import Unfit, read_configuration
from lbllm_cli.engine.memory import on_large_pages
from lbllm_cli.engine.rope import frequencies
from lbllm_cli.engine.tensors import Tensors

# Tokens of a prompt between two looks at whether somebody wants to stop.
CHUNK = 256
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_DTYPES = {"F32": abi.FLOAT32, "BF16": abi.BFLOAT16, "I8": abi.INT8}


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, in this order: penalty, temperature, top_k, top_p, min_p (`lbllm_sampling`).

    temperature: 0 for the likeliest token. top_k: 0 for all. penalty: logits of tokens that were there are divided by it where
    they are positive, else multiplied.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    penalty: float = 1.0


class Runnable(Protocol):
    """A model as the library reads it, which stays where it is. record_bytes: of a key and of a value of one head. limit:
    positions that it was made for.
    """

    lib: Any
    struct: abi.Model
    threads: int
    kv_heads: int
    record_bytes: list[int]
    limit: int


class Model:
    """A `Runnable` of a folder. Raises Unfit where the library cannot run it, UsageError for damaged files."""

    def __init__(self, folder: Path, threads: int):
        lib = abi.library()
        if lib is None:
            raise Unfit("there are no compiled kernels, or LBLLM_KERNELS=off")
        config = read_configuration(folder)
        tensors = Tensors(folder)
        self.lib, self.threads = lib, threads
        self.kv_heads, self.limit = config.num_key_value_heads, config.max_position_embeddings
        self._blocks = Blocks(lib, config, tensors, threads)
        self.record_bytes = self._blocks.record_bytes
        shape = config.vocab_size, config.hidden_size
        embedding = self._embedding = _table(tensors, _EMBEDDING, shape)
        tied = f"{_HEAD}.weight" not in tensors
        if tied and not config.tie_word_embeddings:
            raise Unfit(f"{_HEAD}.weight: there is none")
        head = self._head = embedding if tied else _table(tensors, _HEAD, shape)
        if config.head_bits != 16 and {embedding[1], head[1]} != {"I8"}:
            raise Unfit(f"head_bits {config.head_bits}: embedding or head has others")
        self._norm = tensors.small_floats("model.norm.weight", config.hidden_size)
        tensors.check_all_read()
        try:
            self._frequencies = frequencies(config.head_dim, config.rope)
        except (KeyError, TypeError, ValueError) as error:
            raise Unfit(f"rope_parameters: {error}") from None
        if not np.isfinite(self._frequencies).all():
            raise Unfit("rope_parameters give rotary embeddings that are not finite")
        self.struct = abi.Model(
            self._blocks.structs, _rows(*embedding), _rows(*head), self._norm.ctypes.data, self._frequencies.ctypes.data,
            amplitude=1.0, epsilon=config.rms_norm_eps, count=config.num_hidden_layers, vocab=config.vocab_size,
            hidden=config.hidden_size, head_dim=config.head_dim, norm_dtype=abi.FLOAT32,
        )  # fmt: skip


def _table(tensors: Tensors, owner: str, shape: tuple[int, int]) -> tuple[NDArray[Any], str, NDArray[Any] | None]:
    weight, dtype, scale = tensors.rows(owner, *shape)
    return on_large_pages(weight), dtype, scale


def _rows(weight: NDArray[Any], dtype: str, scale: NDArray[Any] | None) -> abi.Rows:
    return abi.Rows(weight.ctypes.data, None if scale is None else scale.ctypes.data, _DTYPES[dtype])


class _Memory(NamedTuple):
    """Records of keys and values of each block, and the library's view of them. One value: an interrupt between two would leave a
    view of memory that is gone.
    """

    records: list[list[NDArray[np.uint8]]]
    caches: Any
    room: int


class Session:
    """One text: its keys and values, and the tokens that they are of.

    room: tokens that there is memory for; it grows as it must.
    """

    def __init__(self, model: Runnable, room: int = 512):
        self.model, self.tokens = model, list[int]()
        self._logits = np.empty(model.struct.vocab, np.float32)
        self._memory = self._grown(room, None)

    def _grown(self, room: int, before: _Memory | None) -> _Memory:
        """Memory for `room` tokens, with the records of those that are there."""
        model, kept, made = self.model, len(self.tokens), []
        heads, sizes = model.kv_heads, model.record_bytes
        caches = (abi.CacheView * model.struct.count)()
        for index in range(model.struct.count):
            pair = [np.empty((heads, room, size), np.uint8) for size in sizes]
            for new, old in zip(pair, before.records[index] if before else (), strict=False):
                new[:, :kept] = old[:, :kept]
            made.append(pair)
            strides = [stride for array in pair for stride in (array.nbytes, array.strides[0])]
            addresses = (array.ctypes.data for array in pair)
            caches[index] = abi.CacheView(*addresses, *strides, kept, None, 1, heads, *sizes)
        return _Memory(made, caches, room)

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` tokens."""
        del self.tokens[count:]

    def run(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens. Logits of what follows the last, float32 [vocab], which the next call writes over.

        Raises ValueError for no tokens and for one that the model does not have. What a KeyboardInterrupt has cut short is kept
        as far as it went.
        """
        if not tokens:
            raise ValueError("expected tokens, got none")
        wanted = len(self.tokens) + len(tokens)
        if wanted > self._memory.room:
            room = max(wanted, min(2 * self._memory.room, self.model.limit))
            self._memory = self._grown(room, self._memory)
        caches = self._memory.caches
        for start in range(0, len(tokens), CHUNK):
            piece = np.array(tokens[start : start + CHUNK], np.int32)
            last = start + CHUNK >= len(tokens)
            logits = self._logits.ctypes.data if last else None
            model = self.model
            for cache in caches:
                cache.tokens = len(self.tokens)
            model.lib.lbllm_run(byref(model.struct), caches, piece.ctypes.data, len(piece), logits, model.threads)
            self.tokens.extend(tokens[start : start + CHUNK])
        return self._logits


class Sampler:
    """Draws tokens. seed: of the random numbers; equal seeds draw equal tokens from equal logits."""

    def __init__(self, lib: Any, settings: Sampling, seed: int):
        given = (settings.temperature, settings.top_p, settings.min_p, settings.penalty)
        self._lib, self._struct = lib, abi.Sampling(*given, top_k=settings.top_k)
        self._state = c_uint64(seed)

    def draw(self, logits: NDArray[np.float32], before: Sequence[int]) -> int:
        """A token from logits [vocab], which are written over. before: tokens that were there.

        Raises FloatingPointError where logits are not finite.
        """
        penalized = np.array(before, np.int32) if self._struct.penalty != 1.0 else np.empty(0, np.int32)
        token = c_int32()
        arguments = (logits.ctypes.data, len(logits), penalized.ctypes.data, len(penalized))
        self._lib.lbllm_sample(byref(self._struct), *arguments, byref(self._state), byref(token))
        return token.value
