"""How every figure looks: readable in print, in grey and without colour vision."""

import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedsim.report.groups import Series

Item = TypeVar("Item")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's palette, which people without full colour vision can tell apart; grey instead of yellow."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (8, 3)),
    (0, (3, 1)),
    (0, (1, 2)),
)
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "++", "oo", "--")
MOST_LINES = len(COLOURS)
"""Lines in one panel; more go to further panels."""

MOST_MARKERS = 12
LINE_HEIGHT = 0.19
"""Inches of a line of text."""

LOSS = "test loss (nats per label token)"
ROUNDS = "rounds completed"
DPI = 130
RC: Any = {
    "svg.hashsalt": "fedsim",  # element ids are the same in every call
    "font.size": 9.0,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure with what a reader needs beside it.

    Attributes:
        name: of its files, without ending.
        title: one line.
        caption: what is shown, of which runs, in which units.
        figure: drawn, not yet saved.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        """The picture as PNG, without date and version."""
        return self._save("png", {"Software": None})

    def svg(self) -> bytes:
        """The picture as SVG, texts as outlines; the same bytes for the same figure."""
        return self._save("svg", {"Date": None, "Creator": None})

    def _save(self, kind: str, metadata: Mapping[str, None]) -> bytes:
        sink = io.BytesIO()
        with house_style(), warnings.catch_warnings():
            # a label in a script that the font lacks: the caption and the tables have it
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            self.figure.savefig(sink, format=kind, dpi=DPI, metadata=dict(metadata))
        return sink.getvalue()


@contextmanager
def house_style() -> Iterator[None]:
    """Figures are drawn and saved inside; nobody else's settings are used or changed."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        yield


def panels(
    count: int, *, columns: int = 2, width: float = 8.0, height: float = 3.2, **share: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, row by row; sizes in inches, `height` of one row.

    Args:
        count: of panels, at least 1.
        columns: at most this many side by side.
        width: of the figure.
        height: of a row.
        share: `sharex`, `sharey` as in matplotlib.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, **share)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def chunks(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """Consecutive parts of nearly equal length, none longer than `most` and none empty."""
    parts = -(-len(items) // most)
    cuts = [index * len(items) // parts for index in range(parts + 1)] if parts else []
    return [items[low:high] for low, high in pairwise(cuts)]


def look(index: int) -> dict[str, Any]:
    """Colour, marker and line of the `index`-th line of a panel; each differs by all three."""
    place = index % MOST_LINES
    return {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": LINES[place]}


def class_look(index: int, num_classes: int) -> dict[str, Any]:
    """The same for a length class: colours from dark to light, since classes have an order."""
    return {**look(index), "color": class_colour(index, num_classes, lightest=0.8)}


def class_colour(index: int, num_classes: int, lightest: float = 0.95) -> tuple[float, float, float, float]:
    """Colour of a length class; lightness alone tells them apart."""
    share = index / max(num_classes - 1, 1)
    red, green, blue, alpha = mpl.colormaps["viridis"](lightest * share)
    return (red, green, blue, alpha)


def draw_series(axes: Axes, series: Series, label: str, style: Mapping[str, Any]) -> None:
    """Mean as a line; least and most as a band, or as a bar where there is one point only."""
    every = max(1, len(series.x) // MOST_MARKERS)
    axes.plot(series.x, series.mean, label=plain(label), markevery=every, **style)
    if series.count.max() < 2:
        return
    if len(series.x) == 1:
        error = np.stack([series.mean - series.low, series.high - series.mean])
        axes.errorbar(series.x, series.mean, yerror_of(error), color=style["color"], capsize=4, fmt="none")
    else:
        axes.fill_between(series.x, series.low, series.high, color=style["color"], alpha=0.13, linewidth=0)
        for edge in (series.low, series.high):  # bands that overlap are told apart by their edges
            axes.plot(
                series.x, edge, color=style["color"], linestyle=style["linestyle"], linewidth=0.6, alpha=0.7
            )


def yerror_of(error: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances below and above, (2, n), without the negative zeros of rounding."""
    return np.maximum(error, 0.0)


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Names with units on both axes; long ones are broken."""
    axes.set_xlabel(textwrap.fill(x, 60))
    axes.set_ylabel(textwrap.fill(y, 44))


def rounds_axis(axes: Axes) -> None:
    """Whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def plain(text: str) -> str:
    """A text that stands for itself: no formula between dollars, none that a legend skips."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def title(axes: Axes, text: str, width: int = 60) -> None:
    """A panel's title, broken to `width` characters."""
    lines = textwrap.wrap(plain(text), width)
    axes.set_title("\n".join(lines))
    _grow(axes.figure, LINE_HEIGHT * (len(lines) - 1))


def _grow(figure: Any, inches: float) -> None:
    """Room for texts, so that panels keep their height."""
    figure.set_figheight(figure.get_figheight() + inches)


def legend_below(figure: Figure, axes: Axes, *, width: int = 100) -> None:
    """One legend for the figure under its panels, in as many columns as `width` characters allow."""
    handles, labels = axes.get_legend_handles_labels()
    figure_legend(figure, handles, labels, width=width)


def legend_of_all(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels; what several have stands in it once."""
    handles: dict[str, Artist] = {}
    for one in axes:
        handles |= {label: handle for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    figure_legend(figure, list(handles.values()), list(handles))


def figure_legend(
    figure: Figure, handles: Sequence[Artist], labels: Sequence[str], *, width: int = 100, **more: Any
) -> None:
    """The same from handles and plain labels."""
    shown = [textwrap.fill(label, width) for label in labels]
    longest = max((len(line) for label in shown for line in label.split("\n")), default=1) + 8
    columns = max(1, min(len(shown), width // longest))
    rows = -(-len(shown) // columns)
    columns = max(1, -(-len(shown) // max(rows, 1)))  # equally full
    _grow(figure, LINE_HEIGHT * sum(label.count("\n") + 1 for label in shown) / columns)
    figure.legend(
        handles,
        shown,
        loc="outside lower center",
        ncols=columns,
        handlelength=3.5,
        frameon=False,
        **more,
    )


def finish_value_axis(axes: Axes, values: Sequence[NDArray[np.float64]]) -> None:
    """A logarithmic scale where positive values span more than two decades; plain numbers on ticks otherwise."""
    every = np.concatenate([np.ravel(part) for part in values])
    every = every[np.isfinite(every)]
    if every.size and every.min() > 0 and every.max() / every.min() > 100:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)


def same_limits(axes: Axes, values: Sequence[NDArray[np.float64]]) -> None:
    """Limits for figures that are to be compared: a little beyond the least and the most of all values."""
    every = np.concatenate([np.ravel(part) for part in values])
    low, high = float(every.min()), float(every.max())
    if axes.get_yscale() == "log":
        axes.set_ylim(low / 1.3, high * 1.3)
    elif high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def byte_unit(most: float) -> tuple[str, float]:
    """Unit for numbers of bytes up to `most`, and bytes in it."""
    for name, size in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if most >= size:
            return name, size
    return "bytes", 1.0
