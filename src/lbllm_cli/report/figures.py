"""Figures of what was measured, for a report."""

import math
from typing import TYPE_CHECKING

from lbllm_cli.pipeline.drawing import DEPTH, LIGHT, MARKERS, Image, draw, legend, log_scale, whole_numbers
from lbllm_cli.recipe.stages import BASE
from lbllm_cli.report.distributions import InputHistogram, TableHistogram, WeightHistogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def perplexity_ratios(ratios: dict[str, dict[str, float]]) -> Image:
    """Perplexity over the base model's. ratios: checkpoint -> text -> ratio."""
    texts = list(dict.fromkeys(text for found in ratios.values() for text in found))
    values = [value for found in ratios.values() for value in found.values()]

    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot()
        axes.axvline(1, color=LIGHT.stages[BASE], linewidth=1)
        for name, found in ratios.items():
            places = [texts.index(text) for text in found]
            axes.plot(list(found.values()), places, MARKERS[name], color=LIGHT.stages[name], label=name, markersize=7)
        if max(values) > 10 * min(values):
            axes.set_xscale("log")
        axes.set(xlabel="perplexity / perplexity of base", ylim=(len(texts) - 0.5, -0.5))
        axes.set_yticks(range(len(texts)), texts)
        legend(figure, len(ratios))

    spoken = (f"{name} on {text} {value:.2f}" for name, found in ratios.items() for text, value in found.items())
    return draw(f"Perplexity over base: {', '.join(spoken)}.", paint, 1.2 + 0.4 * len(texts))


def signal_to_noise(decibels: dict[str, list[list[float | None]]]) -> Image:
    """Signal to noise after each block. decibels: checkpoint -> text -> a value per block, None or infinite for no error."""

    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for name, found in decibels.items():
            columns = [[v for v in column if v is not None and math.isfinite(v)] for column in zip(*found, strict=True)]
            blocks = [block for block, column in enumerate(columns) if column]
            known = [column for column in columns if column]
            colour, means = LIGHT.stages[name], [sum(column) / len(column) for column in known]
            axes.fill_between(blocks, [min(c) for c in known], [max(c) for c in known], color=colour, alpha=0.15, linewidth=0)
            axes.plot(blocks, means, MARKERS[name] + "-", color=colour, label=name)
        axes.set(xlabel=DEPTH, ylabel="signal to noise, dB")
        whole_numbers(axes)
        legend(figure, len(decibels))

    return draw(f"Signal to noise in decibels after each decoder block, for {', '.join(decibels)}.", paint)


def perplexity_by_position(text: str, positions: dict[str, list[dict[str, float]]]) -> Image:
    """Perplexity where a segment's context is short and where it is long.

    positions: checkpoint -> ranges with `perplexity`, of which that of the first prediction is left out: made from one token, it
    is thousands of times that of the others, and would leave them no room.
    """

    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for name, (_, *ranges) in positions.items():
            middles = [math.sqrt(found["first"] * found["last"]) for found in ranges]
            values = [found["perplexity"] for found in ranges]
            axes.plot(middles, values, MARKERS[name] + "-", color=LIGHT.stages[name], label=name)
        axes.set(xlabel="position in the segment, tokens", ylabel="perplexity", title=text)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        log_scale(axes)
        legend(figure, len(positions))

    return draw(f"Perplexity by position in the segment on {text}, for {', '.join(positions)}.", paint)


def weight_distribution(found: WeightHistogram, stage: str) -> Image:
    """A linear's weights before and after."""

    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot()
        edges = found.edges.tolist()
        axes.stairs(found.decoded.tolist(), edges, fill=True, color=LIGHT.stages[stage], alpha=0.7, label=stage)
        axes.stairs(found.source.tolist(), edges, color=LIGHT.ink, linewidth=1.2, label="source")
        axes.set(xlabel="weight / root mean square of the source's", ylabel="share per unit", title=found.linear.label)
        axes.legend(loc="upper right")

    return draw(f"Distribution of the weights of {found.linear.label}: the source's, and those of {stage}.", paint)


def input_distribution(found: InputHistogram, stage: str) -> Image:
    """What a quantizer saw, one panel per table."""
    name = f"block {found.block}, {found.name}"

    def paint(figure: "Figure") -> None:
        panels = [figure.add_subplot(len(found.tables), 1, index + 1) for index in range(len(found.tables))]
        for axes, table in zip(panels, found.tables, strict=True):
            _table_panel(axes, table, stage)
            axes.set_ylabel("share of values")
        title = name if len(found.tables) == 1 else f"{name}, {found.tables[0].share:.0%} of the values"
        panels[0].set_title(title)
        for axes, table in zip(panels[1:], found.tables[1:], strict=True):
            axes.set_title(f"the other table, {table.share:.0%}")
        panels[-1].set_xlabel("x / step + Z" if found.uniform else "x / step")
        legend(figure, 2)

    alt = f"Distribution of {name} in steps, with the levels of its quantizer and the share of values of each code."
    return draw(alt, paint, 2.3 * len(found.tables) + 0.4)


def _table_panel(axes: "Axes", table: TableHistogram, stage: str) -> None:
    levels = table.levels.tolist()
    used = [(level, share) for level, share in zip(levels, table.codes.tolist(), strict=True) if share]
    axes.grid(visible=False, axis="x")
    axes.vlines(levels, 0, 1, color=LIGHT.grid, linewidth=0.8, transform=axes.get_xaxis_transform())
    axes.stairs(table.density.tolist(), table.edges.tolist(), color=LIGHT.ink, linewidth=1, label="values, per step")
    axes.plot(*zip(*used, strict=True), MARKERS[stage], color=LIGHT.stages[stage], label="codes")
    axes.set_xlim(float(table.edges[0]), float(table.edges[-1]))
    log_scale(axes)
