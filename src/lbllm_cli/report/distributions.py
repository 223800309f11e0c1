"""Distributions for a report: weights before and after binarization, and what activation quantizers make of their inputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_cli.format.activations import join_groups, quantize, reciprocal, split_groups
from lbllm_cli.format.names import input_name
from lbllm_cli.models.block import Block, block_prefix
from lbllm_cli.models.model import SourceModel
from lbllm_cli.models.stored import decoded, stored_block
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.runtime.quantizer import ActQuantizer, read_quantizers

_BINS = 120
# Of the source's root mean square; beyond lie less than one in a million weights of a normal distribution.
WEIGHT_RANGE = 5.0
_MARGIN = 0.15


@dataclass(frozen=True)
class Linear:
    """A linear of a block. error: squared error of its output in ptq, relative to the output."""

    block: int
    name: str
    error: float

    @property
    def label(self) -> str:
        """For people."""
        return f"block {self.block}, {self.name}"


@dataclass(frozen=True)
class WeightHistogram:
    """Shares of a linear's weights, per unit of the source's root mean square, float64 [bins], over edges [bins + 1]."""

    linear: Linear
    edges: Tensor
    source: Tensor
    decoded: Tensor


@dataclass(frozen=True)
class TableHistogram:
    """Values of the groups that took one table of a quantizer.

    share: of the quantizer's values. density: shares per step, float64 [bins], over edges [bins + 1] in steps. levels: T - Z
    (uniform: T). codes: share of values that each level stands for, [levels].
    """

    share: float
    edges: Tensor
    density: Tensor
    levels: Tensor
    codes: Tensor


@dataclass(frozen=True)
class InputHistogram:
    """What one quantizer saw. uniform: places count from the lowest level, which every group has elsewhere."""

    block: int
    name: str
    uniform: bool
    tables: list[TableHistogram]


def worst_linears(records: list[dict[str, Any]], count: int) -> list[Linear]:
    """The `count` linears with the largest errors in ptq's records, worst first."""
    linears = [
        Linear(record["block"], name, facts["error"]) for record in records for name, facts in record.get("linears", {}).items()
    ]
    return sorted(linears, key=lambda linear: (-linear.error, linear.block, linear.name))[:count]


def weight_histogram(model: SourceModel, checkpoint: Checkpoint, linear: Linear) -> WeightHistogram:
    """Source weights of a linear beside those that a checkpoint's codes stand for."""
    owner = block_prefix(linear.block) + linear.name
    stored = {name: tensor for name, tensor in checkpoint.read_block(linear.block).items() if name.startswith(f"{owner}.")}
    source = model.read([f"{owner}.weight"])[f"{owner}.weight"].float()
    stands_for = decoded(stored, model)[f"{owner}.weight"]
    unit = source.square().mean().sqrt().clamp(min=1e-30)
    edges = torch.linspace(-WEIGHT_RANGE, WEIGHT_RANGE, _BINS + 1, dtype=torch.float64)
    return WeightHistogram(linear, edges, _density(source / unit, edges), _density(stands_for / unit, edges))


def _density(values: Tensor, edges: Tensor) -> Tensor:
    """Shares of values per unit of the axis; what lies outside the edges counts in the whole."""
    counts = torch.histc(values.float().cpu(), len(edges) - 1, float(edges[0]), float(edges[-1])).double()
    return counts / (max(1, values.numel()) * (edges[1] - edges[0]))


def input_histograms(
    model: SourceModel, checkpoint: Checkpoint, tokens: Tensor, linears: list[Linear]
) -> Iterator[InputHistogram]:
    """What the quantizers of some linears' inputs see and give on a text, block by block up to the last that is wanted.

    checkpoint: one that quantizes activations. tokens: int64 [rows, length]. Of experts, which share a quantizer, it is what all
    of them read: a token as often as there are experts that it takes.
    """
    inputs: dict[str, str] = {}
    readers: dict[str, list[str]] = {}
    for unit in model.units:
        inputs |= dict.fromkeys(unit, input_name(unit))
        readers.setdefault(input_name(unit), []).append(unit[0])  # the others of it read the same
    wanted = {(linear.block, inputs[linear.name]) for linear in linears}
    layout = checkpoint.activations
    assert layout is not None
    hidden = model.embed()(tokens.to(model.device))
    for index in range(1 + max((block for block, _ in wanted), default=-1)):
        stored = checkpoint.read_block(index)
        block = stored_block(model, index, stored, layout)
        quantizers = read_quantizers(block.layer, block.units, stored, block.prefix, layout)
        seen = {name: _see_inputs(block, readers[name]) for name in sorted(name for number, name in wanted if number == index)}
        hidden = block(hidden)
        for name, pieces in seen.items():
            quantizer, x = quantizers[name], torch.cat([piece.cpu().flatten(0, -2) for piece in pieces])
            yield InputHistogram(index, name, quantizer.tables.zero is None, list(_tables(x, quantizer)))


def _see_inputs(block: Block, linears: list[str]) -> list[Tensor]:
    """A list that a pass fills with what these linears of the block read, [..., width] each time that one is called."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    for name in linears:
        # In front of the quantizer, which is a hook as well.
        block.linear(name).register_forward_pre_hook(keep, prepend=True)
    return seen


def _tables(x: Tensor, quantizer: ActQuantizer) -> Iterator[TableHistogram]:
    """The values [rows, width] by the table that their group took; tables that no group took are left out."""
    tables, width = quantizer.tables, x.shape[-1]
    groups = split_groups(x.float(), quantizer.size)
    found = quantize(groups, tables, quantizer.step_dtype)
    places = groups * reciprocal(found.step).unsqueeze(-1)
    if tables.zero is None:
        places += found.zero.unsqueeze(-1)
    # Without the padding of a ragged last group.
    places, codes = join_groups(places, width), join_groups(found.codes, width).long()
    took = join_groups(found.table.unsqueeze(-1).expand_as(groups), width)
    for index in range(len(tables.levels)):
        mine = took == index
        if not bool(mine.any()):
            continue
        levels = tables.levels[index].double() - (0.0 if tables.zero is None else float(tables.zero[index]))
        margin = _MARGIN * float(levels[-1] - levels[0])
        edges = torch.linspace(float(levels[0]) - margin, float(levels[-1]) + margin, _BINS + 1, dtype=torch.float64)
        shares = torch.bincount(codes[mine], minlength=len(levels)).double() / mine.sum()
        yield TableHistogram(float(mine.double().mean()), edges, _density(places[mine], edges), levels, shares)
