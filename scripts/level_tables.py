"""What forms of stored levels lose on a model's own weights, taken one by one: where the table of levels of 2 bits comes from.

    python scripts/level_tables.py --model models/smollm2-135m --model models/gemma3-270m

Each group's four levels are fitted to its weights alone and then stored in a form: 8 or 4 bits with a scale for each group, or
out of a table of 2 to 16 values for each level with a scale for each row. Tables are found by Lloyd's iteration over all groups;
the last row of a size is `lbllm`'s own table, with levels that know it and the best of some scales for each row. "Free" levels
are not rounded, and fitted from `lbllm`'s starts or from quantiles alone. Squared errors are relative to groups of 64 with levels
of 4 bits.

Below it are 16 means and 16 half-widths of pairs by Lloyd's iteration over groups of 16 of all models, in 24ths of a row's root
mean square: about what `lbllm`'s table is, which is rounded and held to levels in order that int8 has.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import one_hot

from lbllm_cli.format.levels import level_values, project_levels
from lbllm_cli.format.names import HALF_WIDTHS, LEVELS, MEANS
from lbllm_cli.format.weights import grouped
from lbllm_cli.ptq.em import fit_levels, nearest_rank, quantile_levels
from lbllm_cli.ptq.row_levels import fit_row_scale

SIZES, TABLE_BITS, EVERY = (16, 32, 64), (1, 2, 3, 4), 9
# Groups of a linear that a table of pairs is found for, and what its unit is of a row's root mean square.
_SAMPLE, _UNIT = 1000, 24


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


def bytes_of(groups: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Which entry is best for each group, and the rank of each weight in it: groups [n, size], table [256, 4] ascending."""
    found = []
    for part in groups.split(2048):
        costs = torch.zeros(len(part), len(table))
        for weight in part.T:
            costs += (weight[:, None, None] - table).square().amin(-1)
        found.append(costs.argmin(1))
    chosen = torch.cat(found)
    return chosen, nearest_rank(groups, table[chosen])


def pairs_table(means: Tensor, halves: Tensor) -> Tensor:
    """Ascending levels of each byte: means and half-widths of the inner and the outer pair, [16, 2] -> [256, 4]."""
    inner, outer = (means[None, :, pair] for pair in (0, 1))
    near, far = (halves[:, None, pair] for pair in (0, 1))
    return torch.stack([outer - far, inner - near, inner + near, outer + far], -1).flatten(0, 1)


def lloyd_pairs(groups: Tensor, means: Tensor, halves: Tensor, iterations: int = 12) -> tuple[Tensor, Tensor]:
    """Means and half-widths [16, 2] that stand for groups [n, size] and their negatives: by turns the best byte of each group,
    and the best entries for these bytes, by least squares.
    """
    groups, count = torch.cat([groups, -groups]), len(means)
    for _ in range(iterations):
        chosen, ranks = bytes_of(groups, pairs_table(means, halves))
        outer, sign = (ranks % 3 == 0).long(), torch.where(ranks > 1, 1.0, -1.0)
        for pair in (0, 1):
            here = outer == pair
            weight, way = groups[here], sign[here]
            mean, half = ((part[:, None].expand_as(ranks))[here] for part in (chosen % count, chosen // count))
            equations, right = torch.zeros(2 * count, 2 * count), torch.zeros(2 * count)
            for a, of_a in ((mean, torch.ones_like(way)), (half + count, way)):
                right.index_add_(0, a, of_a * weight)
                for b, of_b in ((mean, torch.ones_like(way)), (half + count, way)):
                    equations.index_put_((a, b), of_a * of_b, accumulate=True)
            solved = torch.linalg.lstsq(equations, right[:, None], driver="gelsd").solution[:, 0]
            means[:, pair], halves[:, pair] = solved[:count], solved[count:]
    return means, halves


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
    samples: list[Tensor] = []
    for folder in models:
        weights = linears(folder)
        for weight in weights:
            relative_ = (weight / weight.square().mean(1, keepdim=True).sqrt()).view(-1, SIZES[0])
            samples.append(relative_[torch.randperm(len(relative_))[:_SAMPLE]])
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
    means, halves = (torch.tensor(entries) / _UNIT for entries in (MEANS, HALF_WIDTHS))
    found_pairs = lloyd_pairs(torch.cat(samples), means, halves)
    for name, own, entries in zip(("means", "half-widths"), (MEANS, HALF_WIDTHS), found_pairs, strict=True):
        console.print(f"{name}: {[tuple(round(value * _UNIT, 1) for value in pair) for pair in entries.tolist()]}")
        console.print(f"lbllm's: {list(own)}")


if __name__ == "__main__":
    main()
