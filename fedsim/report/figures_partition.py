"""Who holds what: class shares and sizes of clients, and the scatter of clients and classes."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedsim.report.figures_rounds import class_names
from fedsim.report.folders import RunRecord
from fedsim.report.groups import Group, seed_of
from fedsim.report.style import (
    COLOURS,
    HATCHES,
    Picture,
    chunks,
    class_colour,
    figure_legend,
    label_axes,
    panels,
    plain,
    title,
)

MOST_BARS = 60
"""Clients that are drawn one by one; more are sorted and drawn as a map."""

MOST_COLUMNS = 2000
"""Clients of a map; of more, this many at equal distances in the sorted order."""

MOST_CLASSES = len(HATCHES)
"""Classes that are told apart; of more labels the rarest count together."""

MOST_IN_SCATTER = 50
LARGEST_AREA = 110.0
"""Area of the largest circle of a scatter, in square points."""

SCATTER_PANELS = 4

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ShownPartition:
    """A partition of the report by one kind of class: that of the lowest seed that has one of the groups that share it.

    Attributes:
        heading: what it belongs to, in one line.
        run: whose it is.
        kind: `length class` or `label`.
        counts: (K, C) training examples by listed client and class; (0,) where the file does not tell.
        names: C texts.
    """

    heading: str
    run: RunRecord
    kind: str
    counts: Ints
    names: tuple[str, ...]

    @property
    def clients(self) -> Ints:
        """(K,) ids of the clients that `partition.json` lists: all, or evenly spaced ones of very many."""
        clients: Ints = self.run.partition["listed_clients"]
        return clients

    @property
    def sizes(self) -> Ints:
        """(K,) training examples of each listed client."""
        sizes: Ints = self.run.partition["sizes"]
        return sizes

    @property
    def num_clients(self) -> int:
        """Clients of the partition, listed or not."""
        return int(self.run.partition["num_clients"])

    def shares(self) -> NDArray[np.float64]:
        """(K, C) share of each class in a client's examples; zeros for a client without any."""
        shares: NDArray[np.float64] = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        return shares

    def facts(self) -> str:
        """Overlap and what is used, as `partition.json` has it."""
        partition = self.run.partition
        facts = [f"partitioner {partition.get('partitioner', 'unknown')}", f"{self.num_clients:,} clients"]
        if isinstance(partition.get("unique_examples"), int) and isinstance(
            partition.get("num_examples"), int
        ):
            facts.append(f"{partition['unique_examples']:,} of {partition['num_examples']:,} examples in use")
        if isinstance(partition.get("mean_pairwise_overlap"), int | float):
            facts.append(f"mean pairwise overlap {partition['mean_pairwise_overlap']:.3g}")
        return ", ".join(facts)


def shown_partitions(groups: Sequence[Group]) -> list[ShownPartition]:
    """The partition of each group's lowest seed by length class and, where it has labels, by label too."""
    labels: dict[str, list[str]] = {}
    runs: dict[str, RunRecord] = {}
    for group in groups:
        run = next((run for run in group.runs if run.partition), None)
        if run is not None:
            name = str(run.partition.get("hash", run.path))
            labels.setdefault(name, []).append(group.label)
            runs.setdefault(name, run)
    shown = []
    for name, run in runs.items():
        heading = f"{_heading(labels[name], len(groups))} {seed_of(run)}"
        counts = run.partition["client_class_counts"]
        names = class_names(run)
        texts = tuple(names.get(index, f"class {index}") for index in range(counts.shape[-1]))
        shown.append(ShownPartition(heading, run, "length class", counts, texts))
        if run.partition["client_label_counts"].size:
            counts, texts = _commonest(run.partition["client_label_counts"], run.partition["label_names"])
            shown.append(ShownPartition(heading, run, "label", counts, texts))
    return shown


def partitions(groups: Sequence[Group]) -> list[Picture]:
    """Class shares and sizes of clients, a figure per partition (arXiv 2502.18910, figures 4 and 5)."""
    pictures = []
    for number, shown in enumerate(shown_partitions(groups), start=1):
        many = len(shown.sizes) > MOST_BARS
        figure = _as_map(shown) if many else _as_bars(shown)
        figure.suptitle(plain(textwrap.fill(shown.heading, 100)), fontsize=9.5)
        order = "clients are sorted, see the axes" if many else "clients in the order of their ids"
        facts = shown.facts()
        caption = (
            f"Partition of {shown.heading}: share of each {shown.kind} in a client's training examples, and their "
            f"number; {order}. {facts[:1].upper()}{facts[1:]}."
        )
        name = f"Partition: {shown.kind}s and sizes of clients".replace("classs", "classes")
        pictures.append(Picture(f"partition_{number}", name, caption, figure))
    return pictures


def dirichlet_scatter(groups: Sequence[Group]) -> list[Picture]:
    """Clients by classes, area = examples (arXiv 2502.18910, figure 3); a panel per partition."""
    every = [shown for shown in shown_partitions(groups) if shown.counts.size]
    parts = [
        part
        for kind in ("length class", "label")
        for part in chunks([shown for shown in every if shown.kind == kind], SCATTER_PANELS)
    ]
    pictures = []
    for number, part in enumerate(parts, start=1):
        figure, axes = panels(len(part), height=2.6)
        most = max(int(shown.counts[_sample(shown)].max()) for shown in part)
        for one, shown in zip(axes, part, strict=True):
            _scatter(one, shown, most)
            title(one, shown.heading, 55 if len(part) > 1 else 100)
        sizes = sorted({max(1, most // 10), max(1, most // 3), max(1, most)})
        handles = [_circle((LARGEST_AREA * size / sizes[-1]) ** 0.5) for size in sizes]
        figure_legend(figure, handles, [f"{size:,} example{'s' * (size > 1)}" for size in sizes])
        caption = (
            "Training examples by client and class; the area of a circle is the number of examples, on one scale for "
            f"all panels. Of more than {MOST_IN_SCATTER} clients {MOST_IN_SCATTER} are shown, at equal distances."
        )
        name = "dirichlet_scatter" if number == 1 else f"dirichlet_scatter_{number}"
        pictures.append(Picture(name, "Clients and classes", caption, figure))
    return pictures


def _heading(labels: Sequence[str], num_groups: int) -> str:
    if len(labels) == num_groups and num_groups > 1:
        return "all configurations"
    more = f"; and {len(labels) - 3} more" if len(labels) > 3 else ""
    return "; ".join(labels[:3]) + more


def _commonest(counts: Ints, names: Sequence[str]) -> tuple[Ints, tuple[str, ...]]:
    """The commonest labels, in their order; of too many, the others are one class."""
    shown = tuple(textwrap.shorten(name, 40, placeholder="…") for name in names)
    if len(names) <= MOST_CLASSES:
        return counts, shown
    by_count = np.argsort(-counts.sum(axis=0), kind="stable")
    kept = np.sort(by_count[: MOST_CLASSES - 1])
    others = counts.sum(axis=1) - counts[:, kept].sum(axis=1)
    texts = (*(shown[index] for index in kept), f"{len(names) - len(kept)} rarer labels")
    return np.column_stack([counts[:, kept], others]), texts


def _as_bars(shown: ShownPartition) -> Figure:
    """Stacked shares above, sizes below, a bar per client."""
    rows = 2 if shown.counts.size else 1
    figure, axes = panels(rows, columns=1, height=2.5)
    places = np.arange(len(shown.sizes))
    if shown.counts.size:
        shares = shown.shares()
        bottom = np.zeros(len(places))
        for index, name in enumerate(shown.names):
            axes[0].bar(
                places,
                shares[:, index],
                bottom=bottom,
                width=0.85,
                label=plain(name),
                color=class_colour(index, len(shown.names)),
                hatch=HATCHES[index % len(HATCHES)],
                edgecolor="white",
                linewidth=0.3,
            )
            bottom += shares[:, index]
        axes[0].set_ylim(0, 1)
        label_axes(axes[0], "client", "share of the client's examples")
        figure_legend(figure, *axes[0].get_legend_handles_labels(), handleheight=1.4)
    axes[-1].bar(places, shown.sizes, width=0.85, color=COLOURS[0])
    label_axes(axes[-1], "client", "training examples")
    for one in axes:
        one.set_xlim(-0.6, len(places) - 0.4)
        one.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20, min_n_ticks=1))
        one.grid(visible=False, axis="x")
    return figure


def _as_map(shown: ShownPartition) -> Figure:
    """A map of shares with clients sorted by their mean class, and the sizes sorted."""
    rows = 2 if shown.counts.size else 1
    figure, axes = panels(rows, columns=1, height=2.5)
    if shown.counts.size:
        shares = shown.shares()
        num_classes = len(shown.names)
        picked = _evenly(np.argsort(shares @ np.arange(num_classes), kind="stable"), MOST_COLUMNS)
        # lightness only: white is none, dark is all of a client's examples
        ramp = ListedColormap(np.linspace((1.0, 1.0, 1.0), (0.0, 0.15, 0.35), 256).tolist())
        image = axes[0].imshow(
            shares[picked].T,
            aspect="auto",
            cmap=ramp,
            vmin=0,
            vmax=1,
            origin="lower",
            interpolation="nearest",
            extent=(0, len(picked), -0.5, num_classes - 0.5),
        )
        figure.colorbar(image, ax=axes[0], label="share of the\nclient's examples")
        axes[0].set_yticks(range(num_classes), _class_ticks(shown))
        axes[0].grid(visible=False)
        label_axes(axes[0], f"{_some(len(picked), shown)}, sorted by mean class", shown.kind)
    sizes = _evenly(np.sort(shown.sizes)[::-1], MOST_COLUMNS)
    places = np.arange(len(sizes))
    axes[-1].plot(places, sizes, color=COLOURS[0], drawstyle="steps-mid")
    axes[-1].fill_between(places, sizes, color=COLOURS[0], alpha=0.25, step="mid", linewidth=0)
    axes[-1].set_ylim(bottom=0)
    axes[-1].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlim(0, len(sizes))
    label_axes(axes[-1], f"{_some(len(sizes), shown)}, sorted by size", "training examples")
    return figure


def _some(count: int, shown: ShownPartition) -> str:
    total = shown.num_clients
    return f"{total:,} clients" if count == total else f"{count:,} of {total:,} clients at equal distances"


def _class_ticks(shown: ShownPartition) -> list[str]:
    """Short names of classes: a length class by its number, a label by its name."""
    if shown.kind == "label":
        return [plain(textwrap.shorten(name, 18, placeholder="…")) for name in shown.names]
    return [str(index) for index in range(len(shown.names))]


def _scatter(axes: Axes, shown: ShownPartition, most: int) -> None:
    picked = _sample(shown)
    places, classes = np.nonzero(shown.counts[picked])
    areas = LARGEST_AREA * shown.counts[picked][places, classes] / max(most, 1)
    axes.scatter(places, classes, s=areas, color=COLOURS[0], alpha=0.7, linewidths=0)
    spots = np.arange(0, len(picked), -(-len(picked) // 12))
    axes.set_xticks(spots, [f"{shown.clients[picked[spot]]}" for spot in spots])
    axes.set_yticks(range(shown.counts.shape[1]), _class_ticks(shown))
    axes.set_xlim(-0.8, len(picked) - 0.2)
    axes.margins(y=0.12)
    label_axes(axes, "client" if len(picked) == shown.num_clients else _some(len(picked), shown), shown.kind)


def _circle(diameter: float) -> Line2D:
    return Line2D([], [], linestyle="", marker="o", color=COLOURS[0], alpha=0.7, markersize=diameter)


def _sample(shown: ShownPartition) -> Ints:
    return _evenly(np.arange(len(shown.sizes)), MOST_IN_SCATTER)


def _evenly(items: Ints, most: int) -> Ints:
    """All items, or `most` at equal distances, the first and the last among them."""
    if len(items) <= most:
        return items
    return items[np.linspace(0, len(items) - 1, most).round().astype(np.int64)]
