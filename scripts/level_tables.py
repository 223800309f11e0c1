"""What forms of stored levels lose on a model's own weights, taken one by one: where the table of levels of 2 bits comes from.

    python scripts/level_tables.py --model models/smollm2-135m --model models/gemma3-270m

Each group's four levels are fitted to its weights alone and then stored in a form: 8 or 4 bits with a scale for each group, or
out of a table of 2 to 16 values for each level with a scale for each row. Tables are found by Lloyd's iteration over all groups;
the last row of a size is `lbllm`'s own table, with levels that know it and the best of some scales for each row. "Free" levels
are not rounded, and fitted from `lbllm`'s starts or from quantiles alone. Squared errors are relative to groups of 64 with levels
of 4 bits.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import one_hot

from lbllm_cli.format.level_table import RANK_TO_CODE
from lbllm_cli.format.levels import level_values, project_levels
from lbllm_cli.format.names import LEVELS, TABLE_LEVELS
from lbllm_cli.format.weights import grouped
from lbllm_cli.ptq.em import fit_levels, nearest_rank, quantile_levels
from lbllm_cli.ptq.row_levels import fit_row_scale

SIZES, TABLE_BITS, EVERY = (16, 32, 64), (1, 2, 3, 4), 9


def linears(folder: Path) -> list[Tensor]:
    """Weights of every ninth block's linears, inputs cut to whole groups."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                parts = name.split(".")
                if name.endswith("_proj.weight") and int(parts[parts.index("layers") + 1]) % EVERY == 3:
                    weight = file.get_tensor(name).float()
                    found.append(weight[:, : weight.shape[1] // max(SIZES) * max(SIZES)])
    return found


def fitted(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Groups [out, groups, size] and their levels, [out, groups, 4]."""
    groups = grouped(weight, size)
    return groups, fit_levels(groups.flatten(0, 1), torch.ones(size), 20).view(*groups.shape[:2], 4)


def error(groups: Tensor, levels: Tensor) -> float:
    """Squared, with each weight on the nearest of its group's levels."""
    flat, values = groups.flatten(0, 1), levels.flatten(0, 1).sort(-1).values
    return float((values.gather(1, nearest_rank(flat, values)) - flat).square().sum())


def from_quantiles(groups: Tensor, iterations: int = 20) -> Tensor:
    """Levels of groups [rows, size] by Lloyd's iteration from their quantiles alone, [rows, 4]."""
    levels = quantile_levels(groups)
    for _ in range(iterations):
        member = one_hot(nearest_rank(groups, levels), LEVELS).float()
        count = member.sum(1)
        levels = torch.where(count > 0, (member * groups[..., None]).sum(1) / count.clamp_min(1), levels).sort(-1).values
    return levels


def lloyd(values: Tensor, count: int) -> Tensor:
    """`count` values that stand for many, ascending."""
    table = torch.quantile(values[torch.randperm(len(values))[:100_000]], (torch.arange(count) + 0.5) / count)
    for _ in range(30):
        cell = torch.bucketize(values, (table[1:] + table[:-1]) / 2)
        number = torch.zeros(count).index_add_(0, cell, torch.ones_like(values))
        table = (torch.zeros(count).index_add_(0, cell, values) / number.clamp_min(1)).sort().values
    return table


def rounded(levels: Tensor, table: Tensor) -> Tensor:
    """To the nearest values of a table."""
    return table[torch.bucketize(levels.contiguous(), (table[1:] + table[:-1]) / 2)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", required=True, help="a folder with safetensors")
    models: list[Path] = parser.parse_args().model
    torch.manual_seed(0)
    rows: dict[tuple[str, float], list[float]] = {}
    for folder in models:
        weights = linears(folder)
        each = {size: [fitted(weight, size) for weight in weights] for size in SIZES}
        base = sum(error(groups, level_values(*project_levels(levels, 4))) for groups, levels in each[64])
        for size, found in each.items():
            free = sum(error(groups, levels) for groups, levels in found)
            alone = sum(error(groups, from_quantiles(groups.flatten(0, 1)).view_as(levels)) for groups, levels in found)
            rows.setdefault((f"{size}, free", torch.inf), []).append(free / base)
            rows.setdefault((f"{size}, free, from quantiles alone", torch.inf), []).append(alone / base)
            for bits in (8, 4):
                total = sum(error(groups, level_values(*project_levels(levels, bits))) for groups, levels in found)
                rows.setdefault((f"{size}, {bits} bits", 2 + (4 * bits + 16) / size), []).append(total / base)
            units = [weight.square().mean(1).sqrt()[:, None, None] for weight in weights]
            for bits in TABLE_BITS:
                relative = [levels / unit for (_, levels), unit in zip(found, units, strict=True)]
                tables = [lloyd(torch.cat([part[..., rank].flatten() for part in relative]), 2**bits) for rank in range(4)]
                total = sum(
                    error(groups, torch.stack([rounded(part[..., rank], tables[rank]) for rank in range(4)], -1) * unit)
                    for (groups, _), part, unit in zip(found, relative, units, strict=True)
                )
                rows.setdefault((f"{size}, table of {2**bits}", 2 + 4 * bits / size), []).append(total / base)
            total = 0.0
            for weight, (groups, levels) in zip(weights, found, strict=True):
                scale = fit_row_scale(weight, torch.ones(weight.shape[1]), size, lambda group, cost: fit_levels(group, cost, 20))
                each_group = scale.expand(groups.shape[:2]).flatten()
                known = fit_levels(groups.flatten(0, 1), torch.ones(size), 20, each_group)
                total += error(groups, known.view_as(levels))
            rows.setdefault((f"{size}, table of lbllm", 2 + 8 / size), []).append(total / base)
    shown = Table("group, levels", "bits, but for a row's scale", *(folder.name for folder in models))
    for (name, bits_), found_ in rows.items():
        shown.add_row(name, f"{bits_:.3f}" if bits_ < torch.inf else "", *(f"{value:.3f}" for value in found_))
    console = Console()
    console.print(shown)
    console.print("lbllm's table, ascending:", [TABLE_LEVELS[code // 2] for code in RANK_TO_CODE])


if __name__ == "__main__":
    main()
