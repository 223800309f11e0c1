"""Section `quantizer` of bench_kernels.py: the activation quantizer in training, by the library and in torch."""

from functools import partial
from typing import Any

import torch
from kernel_harness import TABLES, Bench, Record, Walk, medians

from lbllm_cli.format.activations import dequantize, quantize, split_groups
from lbllm_cli.runtime.backend import backend_of
from lbllm_cli.runtime.cpu.quantizer import native_gradients
from lbllm_cli.runtime.torch.quantizer import gradients
from lbllm_cli.training.knees import tables_of

_CALLS = 3


def measure_quantizer(bench: Bench, width: int, tokens: int, group_size: int, threads: int) -> Record:
    """One input: every tier and torch, forward and backward, in milliseconds and in times torch's speed."""
    torch.set_num_threads(threads)
    tables = tables_of(TABLES)
    x = split_groups(torch.randn(tokens, width), group_size)
    quantized = backend_of(x.device).quantized
    upstream, found = torch.randn_like(x), quantized(x, tables, torch.float32)
    in_torch = {
        ("torch", "forward"): lambda: dequantize(quantize(x, tables), tables.levels),
        ("torch", "backward"): partial(gradients, x, tables, found, upstream, (True, True)),
    }
    walks: dict[Any, Walk] = {key: Walk([call] * _CALLS, bench.lib, bench.best) for key, call in in_torch.items()}
    for tier in bench.tiers:
        walks[tier, "forward"] = Walk([partial(quantized, x, tables, torch.float32)] * _CALLS, bench.lib, tier)
        backward = partial(native_gradients, x, tables, found, upstream, (True, True))
        walks[tier, "backward"] = Walk([backward] * _CALLS, bench.lib, tier)
    seconds = medians(walks, bench.arguments.rounds)
    bench.lib.lbllm_choose_tier(bench.best.encode())
    record: Record = {"rounds": bench.arguments.rounds}
    for tier in ("torch", *bench.tiers):
        for way in ("forward", "backward"):
            own = seconds[tier, way]
            record.setdefault(tier, {})[way] = {"ms": own * 1e3, "times_torch": seconds["torch", way] / own}
    return record
