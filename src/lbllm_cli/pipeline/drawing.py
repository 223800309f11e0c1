"""How figures look: SVG in the colours of light and of dark pages, one colour and one marker for each checkpoint."""

import base64
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from lbllm_cli.recipe.stages import BASE, EXPORT, STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One column of a wide page, and not too small to read where a phone shrinks it to its own width.
_WIDTH, _HEIGHT = 5.0, 3.1
DEPTH = "decoder block"
# Told apart without colour as well.
_NAMES = (BASE, *STAGES, EXPORT)
MARKERS = dict(zip(_NAMES, cycle("os^PDXv"), strict=False))


@dataclass(frozen=True)
class Palette:
    """Colours of a page. stages: of each checkpoint, from Okabe and Ito's set, which the colour-blind can tell apart."""

    ink: str
    muted: str
    grid: str
    stages: dict[str, str]


def _coloured(*colours: str) -> dict[str, str]:
    """One for each checkpoint, in their order."""
    return dict(zip(_NAMES, cycle(colours), strict=False))


LIGHT = Palette(
    ink="#1c1c1c", muted="#6a6a6a", grid="#dddddd",
    stages=_coloured("#6a6a6a", "#c05600", "#0072b2", "#2b3f8f", "#00805c", "#5c6f00", "#a8518a"),
)  # fmt: skip
DARK = Palette(
    ink="#e6e6e6", muted="#a0a0a0", grid="#3a3a3a",
    stages=_coloured("#a0a0a0", "#f0a150", "#62b8ee", "#97a9ff", "#33c79c", "#c3d35a", "#e39ac6"),
)  # fmt: skip
_DARKENED = {getattr(LIGHT, name): getattr(DARK, name) for name in ("ink", "muted", "grid")}
_DARKENED |= {LIGHT.stages[name]: DARK.stages[name] for name in LIGHT.stages}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lbllm",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "text.color": LIGHT.ink,
    "axes.labelcolor": LIGHT.ink,
    "axes.edgecolor": LIGHT.muted,
    "xtick.color": LIGHT.muted,
    "ytick.color": LIGHT.muted,
    "xtick.labelcolor": LIGHT.ink,
    "ytick.labelcolor": LIGHT.ink,
    "grid.color": LIGHT.grid,
}


@dataclass(frozen=True)
class Image:
    """A drawing as data URIs for light and dark pages. alt: what it shows, in words."""

    alt: str
    light: str
    dark: str


def draw(alt: str, paint: Callable[["Figure"], None], height: float = _HEIGHT) -> Image:
    """Paints an image in the colours of LIGHT, and gives it those of DARK as well; equal drawings have equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    target = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        paint(figure)
        # Whatever changes from one run to the next is left out of the file.
        figure.savefig(target, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    light = target.getvalue()
    # Painting takes a third of a second, so not twice.
    dark = re.sub("#[0-9a-f]{6}", lambda found: _DARKENED.get(found[0], found[0]), light)
    return Image(alt, *(f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}" for svg in (light, dark)))


def legend(figure: "Figure", columns: int) -> None:
    """Of the first panel, above the drawing, where it hides nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def log_scale(axes: "Axes") -> None:
    """A logarithmic y axis with a few plain numbers, 0.05 and not 5 x 10^-2, however short it is. After everything is drawn."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log", nonpositive="mask")
    low, high = axes.get_ylim()
    if not 0 < low < high < math.inf:
        # Nothing on it is finite, and such an axis is refused when it is drawn.
        axes.set_yscale("linear")
        return
    decades = math.log10(high / low)
    many, some = LogLocator(), LogLocator(subs=(1, 2, 5))
    axes.yaxis.set_major_locator(many if decades > 2 else some if decades > 0.9 else MaxNLocator(5, steps=(1, 2, 5, 10)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:,.10g}")
