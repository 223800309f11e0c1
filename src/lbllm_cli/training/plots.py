"""Figures of training: for a report, and the loss.png of a stage."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbllm_cli.core import files
from lbllm_cli.pipeline.drawing import DEPTH, LIGHT, MARKERS, Image, draw, legend, log_scale, whole_numbers
from lbllm_cli.training.log_records import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HELD_OUT = "squared error / energy of\nthe teacher's output"


def held_out_errors(stage: str, records: list[dict[str, Any]]) -> Image:
    """Error per block on held-out sequences, before and after the training of a stage."""

    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot()
        _errors(axes, records, (LIGHT.muted, LIGHT.stages[stage]))
        axes.set_title(f"{stage}: error on held-out sequences")
        legend(figure, 2)

    return draw(f"Error of each block on held-out sequences before and after {stage}.", paint)


def last_losses(stage: str, records: list[dict[str, Any]]) -> Image:
    """Losses of the last epoch of each block."""
    trained = [record for record in records if record["epochs"]]
    blocks = [record["block"] for record in trained]

    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot()
        axes.axhline(1, color=LIGHT.muted, linewidth=1)
        for key, name, style in (("loss", "training", "--"), ("held_out_loss", "held out", "-")):
            values = [record["epochs"][-1][key] for record in trained]
            axes.plot(blocks, values, style, marker=MARKERS[stage], color=LIGHT.stages[stage], label=name)
        axes.set(xlabel=DEPTH, ylabel="loss / error at the start", title=f"{stage}: loss of the last epoch")
        whole_numbers(axes)
        legend(figure, 2)

    return draw(f"Training and held-out loss of each block in the last epoch of {stage}.", paint)


def _errors(axes: "Axes", records: list[dict[str, Any]], colours: tuple[str, str]) -> None:
    blocks = [record["block"] for record in records]
    # Where no token is massive the lines coincide; the one below is broad and pale, so that both are seen.
    for key, name, colour in zip(("error", "error_ordinary"), ("all", "ordinary"), colours, strict=True):
        looks: dict[str, Any] = {"linewidth": 4, "alpha": 0.4} if name == "all" else {"linewidth": 1.3}
        for when, style in (("before", "--"), ("after", "-")):
            values = [record[when][key] for record in records]
            axes.plot(blocks, values, style, color=colour, label=f"{name} tokens, {when}", **looks)
    axes.set(xlabel=DEPTH, ylabel=_HELD_OUT)
    whole_numbers(axes)
    log_scale(axes)


def plot_errors(events: Path, path: Path) -> None:
    """Per block, error on held-out sequences before and after training, from the last record of each block in `events`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    _errors(axes, read_records(events, "block"), ("C0", "C1"))
    axes.set_title("Output error on held-out sequences, before and after training")
    axes.grid(alpha=0.3)
    legend(figure, 2)
    with files.naming(path):
        figure.savefig(path, dpi=120)


def step_losses(stage: str, records: list[dict[str, Any]]) -> Image:
    """Training loss of an end-to-end phase over its tokens."""

    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot()
        _steps(axes, records, LIGHT.stages[stage], MARKERS[stage])
        axes.set_title(f"{stage}: training loss")

    return draw(f"Training loss of {stage} over the tokens that it has seen.", paint)


def _steps(axes: "Axes", records: list[dict[str, Any]], colour: str, marker: str) -> None:
    tokens, losses = ([record[key] for record in records if record["loss"] is not None] for key in ("tokens", "loss"))
    axes.plot(tokens, losses, marker=marker, markersize=4, color=colour)
    axes.set(xlabel="tokens", ylabel="loss, nats per token")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    log_scale(axes)


def plot_steps(events: Path, path: Path) -> None:
    """Training loss over tokens, from the records of steps in `events`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    _steps(axes, read_records(events, "step"), "C0", ".")
    axes.set_title("Training loss over the tokens seen")
    axes.grid(alpha=0.3)
    with files.naming(path):
        figure.savefig(path, dpi=120)
