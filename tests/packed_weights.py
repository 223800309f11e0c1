"""What tests of kernels share: packed weights and quantized rows with random contents, and the error of a product in float64."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from lbllm_cli.format.level_table import unpack_places
from lbllm_cli.format.names import LEVELS
from lbllm_cli.format.weights import PackedWeight, group_count, pack_codes
from lbllm_cli.runtime.cuda.weights import CudaWeights

Product: TypeAlias = Callable[..., Any]
# in_features, group_size, inputs of a step (0: all of a row), and whether groups are folded
TABLE_SHAPES = [(200, 16, 64, False), (96, 32, 64, False), (72, 16, 48, False), (64, 16, 32, False), (700, 16, 256, False),
                (300, 128, 256, False), (96, 48, 48, False), (200, 16, 64, True), (600, 32, 128, True), (700, 16, 256, True),
                (1100, 32, 512, True), (200, 16, 32, True), (220, 32, 32, True), (300, 32, 64, True), (200, 16, 0, False),
                (330, 32, 0, False), (300, 128, 0, False), (130, 48, 0, False), (9, 16, 0, False), (200, 16, 0, True),
                (330, 32, 0, True)]  # fmt: skip


def random_weights(in_features: int, outs: tuple[int, ...], group_size: int, seed: int = 0, bits: int = 8) -> list[PackedWeight]:
    """Linears with one input, as a checkpoint may have them: any levels, scales down to a subnormal one. bits: of a level."""
    g, groups, found = torch.Generator().manual_seed(seed), group_count(in_features, group_size), []
    for out in outs:
        codes = pack_codes(torch.randint(0, LEVELS, (out, in_features), generator=g, dtype=torch.uint8), group_size)
        levels = torch.randint(-127, 128, (out, groups, LEVELS), generator=g).to(torch.int8)
        scale = (torch.rand(out, groups, generator=g) * 0.02 + 1e-3).half()
        scale[0, 0] = 3 * 2.0**-24
        if bits == 2:
            levels = unpack_places(torch.randint(0, 256, (out, groups, 1), generator=g, dtype=torch.uint8))
            scale = scale[:, :1].expand(out, groups)
        found.append(PackedWeight(codes, levels, scale, in_features, bits))
    return found


def moved(linears: list[PackedWeight], device: torch.device) -> list[PackedWeight]:
    """On a device."""
    return [linear.moved(lambda tensor: tensor.to(device)) for linear in linears]


def quantized_rows(
    rows: int, width: int, group_size: int, per: str, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """T - Z int8 [rows, width filled up with zeros], steps [rows, groups] or [rows, 1], and values, float64 [rows, width]."""
    g, groups = torch.Generator().manual_seed(100 + seed), group_count(width, group_size)
    places = torch.randint(-127, 128, (rows, groups * group_size), generator=g).to(torch.int8)
    places[:, width:] = 0
    step = torch.rand(rows, groups if per == "group" else 1, generator=g) + 0.1
    each = step.double().repeat_interleave(group_size if per == "group" else places.shape[1], 1)
    return places, step, (places.double() * each)[:, :width]


def step_error(product: Product, device: torch.device, rows: int, inn: int, size: int, step: int, fold: bool) -> float:
    """`off` of a product of levels of 2 bits with inputs of which `step` share a step, 0 for all of a row."""
    linears = random_weights(inn, (5, 2), size, bits=2)
    places, steps, x = quantized_rows(rows, inn, step or size, "group" if step else "token")
    weights = CudaWeights.of(moved(linears, device), fold)
    # As wide as the layout: what is cut off are zeros as well.
    places = torch.nn.functional.pad(places, (0, weights.padded_width - places.shape[1])).contiguous()
    out = torch.full((rows, 7), torch.nan, device=device)
    product(weights, places.to(device), steps.to(device), step // size, out)
    return off(out, x, linears, None)


def value_error(product: Product, device: torch.device, rows: int, inn: int, size: int, fold: bool) -> float:
    """The same of a product with inputs in full precision."""
    linears, x = random_weights(inn, (5, 2), size, bits=2), torch.randn(rows, inn, generator=torch.Generator().manual_seed(1))
    out = torch.full((rows, 7), torch.nan, device=device)
    product(CudaWeights.of(moved(linears, device), fold), x.to(device), out)
    return off(out, x.double(), linears, None)


def off(found: torch.Tensor, x: torch.Tensor, linears: list[PackedWeight], bias: torch.Tensor | None) -> float:
    """Largest error of outputs of all linears against float64, relative to the sum of the sizes of the terms. x float64."""
    weight = torch.cat([linear.values() for linear in linears]).double()
    wanted, terms = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        wanted, terms = wanted + bias.double(), terms + bias.double().abs()
    difference = (found.cpu().double() - wanted).abs()
    return float((difference / terms.clamp(min=1e-30)).nan_to_num(torch.inf).max())
