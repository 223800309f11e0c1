"""Section `linear` of bench_kernels.py: one packed linear beside torch's and beside reading memory."""

from ctypes import byref
from functools import partial
from typing import Any

import torch
from kernel_harness import CHUNK, TABLES, WEIGHT_RMS, Bench, Record, Walk, medians
from torch import Tensor
from torch.nn.functional import linear as dense_linear

import lbllm_cli.hf  # noqa: F401  registers the packed format
from lbllm_cli.engine.abi import Weights
from lbllm_cli.format.levels import level_max, per_row
from lbllm_cli.format.names import LEVELS
from lbllm_cli.format.weights import group_count
from lbllm_cli.runtime.cpu.library import DTYPES, pointer, quantizer_struct
from lbllm_cli.runtime.cpu.unit import Unit, aligned
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer
from lbllm_cli.training.knees import tables_of

GRANULARITIES = ("group", "token")


def random_packed(inputs: int, outputs: int, group_size: int, level_bits: int = 8) -> dict[str, Tensor]:
    """Random tensors of a packed linear, with weights of the usual size."""
    groups = group_count(inputs, group_size)
    weight = torch.randint(256, (outputs, groups, group_size // 4), dtype=torch.uint8)
    if per_row(level_bits):
        places = torch.randint(256, (outputs, groups, 1), dtype=torch.uint8)
        scale = torch.full((outputs, 1), 4 * WEIGHT_RMS / level_max(2), dtype=torch.float16)
        return {"weight": weight, "levels": places, "scale": scale}
    return {
        "weight": weight,
        "levels": torch.randint(-level_max(8), level_max(8) + 1, (outputs, groups, LEVELS), dtype=torch.int8),
        "scale": torch.full((outputs, groups), WEIGHT_RMS * 3**0.5 / level_max(8), dtype=torch.float16),
    }


def stored_bytes(inputs: int, outputs: int, group_size: int, level_bits: int = 8) -> float:
    """Codes, levels and float16 scales of a linear, without padding."""
    groups = group_count(inputs, group_size)
    return outputs * (inputs / 4 + (groups + 2 if per_row(level_bits) else groups * (LEVELS + 2)))


def packed_walks(bench: Bench, inputs: int, outputs: int, x: Tensor, threads: int) -> dict[tuple[str, int, int, str], Walk]:
    """A walk for each tier, group size, bits of a level and granularity; granularities and tiers share the copies of the weights.

    With levels of 2 bits, as many inputs share a step as the arguments say.
    """
    walks, y = {}, x.new_empty(len(x), outputs)
    forms = [(size, 8) for size in bench.arguments.groups] + [(size, 2) for size in bench.arguments.table_groups]
    for group_size, level_bits in forms:
        packed = PackedLinear(inputs, outputs, group_size, False, level_bits)
        packed.load_state_dict(random_packed(inputs, outputs, group_size, level_bits))
        step = bench.arguments.step if per_row(level_bits) else group_size
        unit = Unit([packed], ActQuantizer(tables_of(TABLES), step))
        tiles = unit.tiles
        stride = -(-len(tiles) // 64) * 64
        count = bench.copies(len(tiles))
        room = aligned(count * stride).view(count, stride)
        room[:, : len(tiles)] = tiles
        weights = [Weights(pointer(row), None, inputs, outputs, *unit.sizes) for row in room]
        for granularity in GRANULARITIES:
            quantizer = quantizer_struct(tables_of(TABLES), step if granularity == "group" else inputs)
            common = (byref(quantizer), pointer(x), pointer(y), DTYPES[x.dtype], len(x), threads)
            for name in bench.tiers:
                calls = [partial(bench.lib.lbllm_linear, byref(w), *common) for w in weights]
                walks[name, group_size, level_bits, granularity] = Walk(calls, bench.lib, name, room, x, y)
    return walks


def dense_walk(bench: Bench, outputs: int, x: Tensor) -> Walk:
    """torch's product with dense weights in the dtype of x."""
    weight = torch.randn(outputs, x.shape[1]).mul_(WEIGHT_RMS).to(x.dtype)
    copies = [weight.clone() for _ in range(bench.copies(weight.nbytes))]
    return Walk([partial(dense_linear, x, copy) for copy in copies], bench.lib, bench.best)


def measure_linear(bench: Bench, inputs: int, outputs: int, rows: int, threads: int) -> Record:
    """One shape: every kernel, torch in both dtypes, reading."""
    torch.set_num_threads(threads)
    x = torch.randn(rows, inputs)
    walks: dict[Any, Walk] = packed_walks(bench, inputs, outputs, x.bfloat16(), threads)
    others = {"bfloat16": dense_walk(bench, outputs, x.bfloat16()), "float32": dense_walk(bench, outputs, x)}
    seconds = medians({**walks, **others, "read": bench.reading(threads)}, bench.arguments.rounds)
    bench.lib.lbllm_choose_tier(bench.best.encode())
    bandwidth = CHUNK / seconds["read"]
    kernels = []
    for key in walks:
        speed = stored_bytes(inputs, outputs, key[1], key[2]) / seconds[key]
        record = dict(zip(("tier", "group_size", "level_bits", "granularity"), key, strict=True))
        record |= {"us": seconds[key] * 1e6, "gb_s": speed / 1e9, "bandwidth_share": speed / bandwidth}
        kernels.append(record | {f"times_{name}": seconds[name] / seconds[key] for name in others})
    torch_us = {name: seconds[name] * 1e6 for name in others}
    return {"rounds": bench.arguments.rounds, "read_gb_s": bandwidth / 1e9, "torch_us": torch_us, "kernels": kernels}
