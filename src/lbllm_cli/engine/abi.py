"""The compiled library through ctypes: finding it, choosing its tier, and the structures of its ABI (native/lbllm_kernels.h).

ctypes, not a torch extension: one wheel serves every torch, and a call costs a third of a registered operator's. Nor does an
export that runs in the library alone need torch.
"""

import ctypes
import logging
import os
import sys
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_float, c_int8, c_int32, c_int64, c_uint8, c_uint64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lbllm_cli.core.errors import UsageError
from lbllm_cli.engine.location import library_path
from lbllm_cli.format.names import LATTICE_MAX

ABI = 6
TIERS = ("portable", "avx2", "avxvnni", "avx512")
VARIABLE = "LBLLM_KERNELS"
FLOAT32, BFLOAT16, INT8 = 0, 1, 2
# Sums of a group's levels are int16 in the library.
GROUP_MAX = 256
# Inputs whose levels a byte says in the library, where a row has one scale; and its groups where no step says how large they are.
LEVEL_GROUP, ROW_GROUP = 16, 64
# The library decodes a head's record into a buffer of this many floats.
HEAD_MAX = 256
# What an entry answers that refuses what it was given (native/lbllm_kernels.h). Callers check first, by name: this is what keeps
# a caller's mistake from being a write past a buffer.
_REFUSALS = dict(
    enumerate(("a size", "an element type", "a quantizer", "the shapes of a block", "the shapes of a cache", "a token"), 1)
)
_NOT_FINITE = 7

_log = logging.getLogger("lbllm")


class Weights(Structure):
    """`lbllm_weights`."""

    _fields_ = [
        *((name, c_void_p) for name in ("tiles", "bias")),
        *((name, c_int32) for name in ("in_features", "out_features", "group_size", "level_group")),
    ]


class Quantizer(Structure):
    """`lbllm_quantizer`."""

    _fields_ = [
        ("tables", c_int32),
        ("size", c_int32),
        ("top", c_int32 * 2),
        ("zero", c_int32 * 2),
        ("clip", c_float * 2 * 2),
        ("lattice", c_int8 * (LATTICE_MAX + 1) * 2),
        ("code", c_uint8 * (LATTICE_MAX + 1) * 2),
        ("value", c_int8 * 16 * 2),
    ]


class Block(Structure):
    """`lbllm_block`."""

    _fields_ = [
        *((name, Weights) for name in ("qkv", "o", "gate_up", "down")),
        *((name, POINTER(Quantizer)) for name in ("qkv_input", "o_input", "gate_up_input", "down_input", "keys", "values")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm", "key_centre")),
        *((name, c_float) for name in ("epsilon", "scaling")),
        *((name, c_int32) for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "norm_dtype")),
    ]


class CacheView(Structure):
    """`lbllm_cache`."""

    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("key_row_stride", "key_head_stride", "value_row_stride", "value_head_stride", "tokens")),
        ("mask", c_void_p),
        ("rows", c_int64),
        *((name, c_int32) for name in ("kv_heads", "key_bytes", "value_bytes")),
    ]


class Rows(Structure):
    """`lbllm_rows`."""

    _fields_ = [("weight", c_void_p), ("scale", c_void_p), ("dtype", c_int32)]


class Model(Structure):
    """`lbllm_model`."""

    _fields_ = [
        ("blocks", POINTER(Block)),
        *((name, Rows) for name in ("embedding", "head")),
        *((name, c_void_p) for name in ("norm", "frequencies")),
        *((name, c_float) for name in ("amplitude", "epsilon")),
        *((name, c_int32) for name in ("count", "vocab", "hidden", "head_dim", "norm_dtype")),
    ]


class Sampling(Structure):
    """`lbllm_sampling`."""

    _fields_ = [*((name, c_float) for name in ("temperature", "top_p", "min_p", "penalty")), ("top_k", c_int32)]


def _status(code: int) -> None:
    """What ctypes makes of an entry's answer.

    Raises ValueError where it refused, FloatingPointError for logits that nothing can be drawn from.
    """
    if code == _NOT_FINITE:
        raise FloatingPointError("logits are not finite")
    if code:
        raise ValueError(f"the compiled kernels refuse {_REFUSALS.get(code, code)}; nothing was computed")


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "lbllm_abi": (c_int32, []),
    "lbllm_tier": (c_char_p, []),
    "lbllm_choose_tier": (c_int32, [c_char_p]),
    "lbllm_tiles_bytes": (c_int64, [c_int32] * 4),
    "lbllm_pack": (_status, [c_void_p] * 3 + [c_int32] * 4 + [c_void_p, c_int32]),
    "lbllm_unpack": (_status, [POINTER(Weights), c_int32, c_int32] + [c_void_p] * 3),
    "lbllm_quantize": (_status, [POINTER(Quantizer), c_void_p, c_int32, c_int64, c_int32] + [c_void_p] * 5 + [c_int32] * 2),
    "lbllm_quantize_backward": (_status, [POINTER(Quantizer), c_void_p, c_int32, c_int64] + [c_void_p] * 7 + [c_int32]),
    "lbllm_linear": (_status, [POINTER(Weights), POINTER(Quantizer), c_void_p, c_void_p, c_int32, c_int64, c_int32]),
    "lbllm_block_step": (_status, [POINTER(Block), POINTER(CacheView)] + [c_void_p] * 4 + [c_int32, c_int64, c_int32]),
    "lbllm_run": (_status, [POINTER(Model), POINTER(CacheView), c_void_p, c_int64, c_void_p, c_int32]),
    "lbllm_sample": (_status, [POINTER(Sampling), c_void_p, c_int32, c_void_p, c_int64, POINTER(c_uint64), POINTER(c_int32)]),
    "lbllm_head": (_status, [POINTER(Rows), c_void_p, c_void_p, c_int32, c_int64, c_int32, c_int64, c_int32]),
    "lbllm_read": (c_uint64, [c_void_p, c_int64, c_int32]),
}


@cache
def library() -> Any | None:
    """The library with the tier that LBLLM_KERNELS asks for, or None: linears then run in torch, which one log line says.

    LBLLM_KERNELS: `auto` (the best tier of this CPU), the name of a tier, or `off`. Raises UsageError for anything else, for a
    tier that this CPU or this build does not have, and for a library of another ABI.
    """
    wanted = os.environ.get(VARIABLE, "auto") or "auto"
    if wanted not in ("auto", "off", *TIERS):
        raise UsageError(f"{VARIABLE}={wanted}: expected auto, off, or one of {', '.join(TIERS)}")
    if wanted == "off":
        return None
    path = library_path()
    if path is None:
        if wanted != "auto":
            raise UsageError(f"{VARIABLE}={wanted}: this installation has no compiled kernels; install it with a C++ compiler")
        _log.warning("this installation has no compiled kernels: packed models run in torch, many times slower")
        return None
    _load_openmp()
    found = ctypes.CDLL(str(path))
    # Before the others are looked up: an older library does not have them all.
    if found.lbllm_abi() != ABI:
        raise UsageError(f"{path} has ABI {found.lbllm_abi()}, expected {ABI}; install lbllm-cli again")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    if wanted != "auto" and found.lbllm_choose_tier(wanted.encode()):
        raise UsageError(f"{VARIABLE}={wanted}: not in this build, or not supported by this CPU; here: {tier(found)}")
    return found


def _load_openmp() -> None:
    """The OpenMP runtime that torch brings, where torch is installed and not imported: the library takes it, and a process that
    imports torch later does not have two, each with threads of its own.
    """
    if "torch" in sys.modules or (found := find_spec("torch")) is None:
        return
    for folder in found.submodule_search_locations or ():
        for path in sorted(Path(folder, "lib").glob("libgomp*")):
            ctypes.CDLL(str(path))


def tier(lib: Any) -> str:
    """Name of the tier that `lib` runs."""
    return str(lib.lbllm_tier().decode())


def record_bytes(width: int, size: int) -> int:
    """Bytes of a key or value of `width` values, `size` of which share a step: 64 in one group -> 35."""
    return -(-width // size) * ((size + 1) // 2 + 3)


class Table(NamedTuple):
    """A table of an activation quantizer in plain numbers: T ascending, Z (None in the uniform form), clipping factors."""

    levels: Sequence[int]
    zero: int | None
    clip: tuple[float, float]


def fits(tables: Sequence[Table], cached: bool = False) -> bool:
    """Whether the library has this quantizer: places up to 127; 4-bit codes where it reads them from a cache."""
    return max(table.levels[-1] for table in tables) <= LATTICE_MAX and (not cached or len(tables[0].levels) == 16)


def nearest_codes(levels: Sequence[int]) -> list[int]:
    """Code nearest to each lattice place, the lower one on a tie: (0, 1, 4) -> [0, 1, 1, 2, 2]."""
    found, code = [], 0
    for place in range(levels[-1] + 1):
        while code + 1 < len(levels) and 2 * place > levels[code] + levels[code + 1]:
            code += 1
        found.append(code)
    return found


def quantizer(tables: Sequence[Table], size: int) -> Quantizer:
    """A quantizer with its lookups worked out. size: values that share a step. Raises ValueError where it does not fit."""
    if not fits(tables):
        top = max(table.levels[-1] for table in tables)
        raise ValueError(f"the compiled kernels have tables up to {LATTICE_MAX}, this one reaches {top}")
    struct = Quantizer(tables=0 if tables[0].zero is None else len(tables), size=size)
    for t, (levels, given, clip) in enumerate(tables):
        zero, nearest = given or 0, nearest_codes(levels)
        struct.top[t], struct.zero[t] = levels[-1], zero
        struct.clip[t][:] = clip
        struct.lattice[t][: len(nearest)] = [levels[code] - zero for code in nearest]
        struct.code[t][: len(nearest)] = nearest
        if len(levels) == 16:
            struct.value[t][:] = [level - zero for level in levels]
    return struct
