"""What tests of kernels share: packed weights and quantized rows with random contents, and the error of a product in float64."""

import torch

from lbllm_cli.format.level_table import unpack_places
from lbllm_cli.format.names import LEVELS
from lbllm_cli.format.weights import PackedWeight, group_count, pack_codes


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


def sharing_rows(
    rows: int, in_features: int, group_size: int, step: int
) -> tuple[list[PackedWeight], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Linears with levels of 2 bits, and rows as `quantized_rows` gives them, of which `step` inputs share a step: places as wide
    as the weights."""
    linears = random_weights(in_features, (5, 2), group_size, bits=2)
    places, steps, x = quantized_rows(rows, in_features, step, "group")
    return linears, places[:, : group_count(in_features, group_size) * group_size].contiguous(), steps, x


def filled_up(places: torch.Tensor, width: int) -> torch.Tensor:
    """Rows as wide as the layout of weights, zeros behind them."""
    return torch.nn.functional.pad(places, (0, width - places.shape[1]))


def off(found: torch.Tensor, x: torch.Tensor, linears: list[PackedWeight], bias: torch.Tensor | None) -> float:
    """Largest error of outputs of all linears against float64, relative to the sum of the sizes of the terms. x float64."""
    weight = torch.cat([linear.values() for linear in linears]).double()
    wanted, terms = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        wanted, terms = wanted + bias.double(), terms + bias.double().abs()
    difference = (found.cpu().double() - wanted).abs()
    return float((difference / terms.clamp(min=1e-30)).nan_to_num(torch.inf).max())
