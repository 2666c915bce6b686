"""Figures by round, a line per group: loss, fairness, length classes, communication, time."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes

from fedsim.report.folders import RunRecord
from fedsim.report.groups import Group, Series, Spread, most_seeds, with_seeds
from fedsim.report.style import (
    COLOURS,
    HATCHES,
    LOSS,
    MOST_LINES,
    ROUNDS,
    Picture,
    byte_unit,
    chunks,
    class_look,
    draw_series,
    figure_legend,
    finish_value_axis,
    label_axes,
    legend_below,
    look,
    panels,
    plain,
    rounds_axis,
    same_limits,
    title,
    yerror_of,
)

MOST_PANELS = 6
"""Panels of one figure where each group has its own."""

OVER_SEEDS = "Lines are means over seeds, bands reach from the least to the most."
DRAWS_TEST_SET = ("data.test_fraction", "data.instruction.hold_out_fraction", "evaluation.max_test_examples")
"""Keys by which run.seed decides which examples the global model is tested on."""

SAME_LOSS = 1e-5
"""Relative difference up to which two losses are those of one model on one set, in batches of other shapes."""

PHASES = ("train_s", "wait_s", "gather_s", "aggregate_s", "evaluate_s")
"""Phases of a round as fedsim/server/round.py times them, in that order; others follow by name."""


def global_loss(groups: Sequence[Group]) -> list[Picture]:
    """Global test loss by round (arXiv 2502.18910, figures 6 and 7)."""
    caption = (
        "Test loss of the global model after each round, and before training at 0; for strategies without a global "
        f"model the mean of the cohort's client losses. {OVER_SEEDS}"
    )
    drawn = [key for key in DRAWS_TEST_SET if any(key in _draws_of(group) for group in groups)]
    if drawn:
        caption += (
            f" Each seed draws its own test set ({', '.join(drawn)}), so that a band contains the differences between "
            "test sets."
        )
    return _lines(
        groups,
        "test/loss",
        "global_test_loss",
        "Global test loss by round",
        LOSS,
        caption,
        "test/loss_initial",
    )


def _draws_of(group: Group) -> list[str]:
    """Keys by which the seed draws the global test set; none where it is the same for all seeds.

    Before training all seeds have the base's own loss, unless they are tested on different examples.
    """
    config = group.first.config
    before = [run.values("test/loss_initial").get(0) for run in group.runs]
    known = [loss for loss in before if loss is not None]
    is_same = len(known) == len(before) and max(known) <= min(known) * (1 + SAME_LOSS)
    if group.num_seeds < 2 or is_same:
        return []
    held_out = config["data.instruction.hold_out"] != "none"
    drawn = {
        "data.test_fraction": config["data.test_split"] is None and not held_out,
        "data.instruction.hold_out_fraction": held_out and not config["data.instruction.hold_out_names"],
        "evaluation.max_test_examples": config["evaluation.max_test_examples"] is not None,
    }
    return [key for key in DRAWS_TEST_SET if drawn[key]]


def train_loss(groups: Sequence[Group]) -> list[Picture]:
    """Training loss by round, beside the test loss (arXiv 2402.11505, figure 6)."""
    caption = (
        "Training loss of the round's clients: mean over a client's steps, then over the clients, each round's own "
        f"cohort. {OVER_SEEDS}"
    )
    unit = "training loss (nats per label token)"
    return _lines(groups, "train/loss", "train_loss", "Training loss by round", unit, caption)


def fairness(groups: Sequence[Group]) -> list[Picture]:
    """Variance of client test losses by round."""
    caption = (
        "Population variance of the test losses of the round's clients after local training; lower is more even. "
        f"{OVER_SEEDS}"
    )
    return _lines(
        groups,
        "fairness/test_loss_variance",
        "fairness",
        "Fairness by round",
        "variance of client test losses (nats² per token²)",
        caption,
    )


def _lines(
    groups: Sequence[Group],
    key: str,
    name: str,
    heading: str,
    unit: str,
    caption: str,
    initial_key: str | None = None,
) -> list[Picture]:
    """A line per group that has the metric."""
    found = [
        (with_seeds(group.label, series.num_seeds, most_seeds(groups)), series)
        for group in groups
        if (series := group.series(key, initial_key))
    ]
    return line_pictures(found, name, heading, unit, caption)


def line_pictures(
    found: Sequence[tuple[str, Series]], name: str, heading: str, unit: str, caption: str
) -> list[Picture]:
    """A line for each label by round; more than `MOST_LINES` go to further figures with the same scale."""
    every = [series.low for _, series in found] + [series.high for _, series in found]
    pictures = []
    for number, part in enumerate(chunks(found, MOST_LINES), start=1):
        figure, (axes,) = panels(1, height=3.6)
        for index, (label, series) in enumerate(part):
            draw_series(axes, series, label, look(index))
        _by_round(axes, unit)
        finish_value_axis(axes, every)
        if len(found) > len(part):
            same_limits(axes, every)
        if len(part) > 1:
            legend_below(figure, axes)
        else:
            title(axes, part[0][0], 100)
        pictures.append(Picture(_numbered(name, number), heading, caption, figure))
    return pictures


def _by_round(axes: Axes, unit: str) -> None:
    label_axes(axes, ROUNDS, unit)
    axes.tick_params(labelbottom=True, labelleft=True)
    rounds_axis(axes)


def class_loss_by_round(groups: Sequence[Group]) -> list[Picture]:
    """Test loss of each length class by round, a panel per group."""
    found = [(group, _class_series(group)) for group in groups]
    found = [(group, series) for group, series in found if series]
    pictures = []
    for number, part in enumerate(chunks(found, MOST_PANELS), start=1):
        figure, axes = panels(len(part), sharey=True)
        most = max((series for _, series in part), key=len)
        for one, (group, series) in zip(axes, part, strict=True):
            texts = class_names(group.first)
            for index, line in series.items():
                draw_series(one, line, texts.get(index, f"class {index}"), class_look(index, max(series) + 1))
            num_seeds = max(line.num_seeds for line in series.values())
            heading = with_seeds(group.label, num_seeds, most_seeds(groups))
            title(one, heading, 55 if len(part) > 1 else 100)
            _by_round(one, LOSS)
            finish_value_axis(one, [line.mean for line in series.values()])
        legend_below(figure, axes[[series for _, series in part].index(most)])
        caption = f"Test loss of the global model on the test examples of each length class. {OVER_SEEDS}"
        pictures.append(
            Picture(
                _numbered("class_loss_by_round", number),
                "Test loss by length class and round",
                caption,
                figure,
            )
        )
    return pictures


def class_loss_at_end(groups: Sequence[Group]) -> list[Picture]:
    """Test loss of each length class after the last round that measured it, all groups together."""
    found = [(group, _class_losses_at_end(group)) for group in groups]
    found = [(group, losses) for group, losses in found if losses]
    pictures = []
    for number, part in enumerate(chunks(found, MOST_LINES), start=1):
        figure, (axes,) = panels(1, height=3.8)
        num_classes = max(max(losses) for _, losses in part) + 1
        for index, (group, losses) in enumerate(part):
            # side by side, so that bars of equal losses do not hide each other
            x = np.array(list(losses), dtype=np.float64) + (index - (len(part) - 1) / 2) * 0.6 / len(part)
            mean = np.array([spread.mean for spread in losses.values()])
            error = np.array(
                [(spread.mean - spread.low, spread.high - spread.mean) for spread in losses.values()]
            )
            tested = group.seeds_with(lambda run, group=group: _any_class_loss(run, group))  # type: ignore[misc]
            label = with_seeds(group.label, tested, most_seeds(groups))
            axes.errorbar(x, mean, yerror_of(error.T), label=plain(label), capsize=3, **look(index))
        texts = class_names(part[0][0].first)
        axes.set_xticks(
            range(num_classes),
            [textwrap.fill(texts.get(index, f"class {index}"), 16) for index in range(num_classes)],
        )
        label_axes(axes, "length class of the test example", LOSS)
        axes.ticklabel_format(axis="y", useOffset=False)
        if len(part) > 1:
            legend_below(figure, axes)
        else:
            title(axes, part[0][0].label, 100)
        caption = "Test loss by length class after the last round: mean over seeds, bars from the least to the most."
        pictures.append(
            Picture(
                _numbered("class_loss_at_end", number),
                "Test loss by length class at the end",
                caption,
                figure,
            )
        )
    return pictures


def final_loss(groups: Sequence[Group]) -> list[Picture]:
    """Final test loss of every seed by configuration, so that arms can be compared seed by seed."""
    pictures = []
    for number, part in enumerate(chunks(groups, MOST_LINES), start=1):
        found = [(group, group.spread(lambda run: run.last("test/loss"))) for group in part]
        measured = [
            (group, spread) for group, spread in found if spread is not None and np.isfinite(spread.mean)
        ]
        if len(groups) < 2 or not measured:
            continue
        figure, (axes,) = panels(1, height=1.6 + 0.42 * len(measured))
        means = [spread.mean for _, spread in measured]
        axes.scatter(means, range(len(means)), s=350, marker="|", color="black", linewidths=2, label="mean")
        seeds = sorted({run.seed for group, _ in measured for run in group.runs})[:MOST_LINES]
        for index, seed in enumerate(seeds):
            places = [
                (place, loss)
                for place, (group, _) in enumerate(measured)
                for run in group.runs
                if run.seed == seed and (loss := run.last("test/loss")) is not None
            ]
            if not places:
                continue
            y, x = np.array(places, dtype=np.float64).T
            axes.plot(x, y, label=f"seed {seed}", **{**look(index), "linewidth": 0.8})
        tested = [group.seeds_with(lambda run: run.last("test/loss")) for group, _ in measured]
        texts = [
            textwrap.fill(plain(with_seeds(group.label, count, most_seeds(groups))), 44)
            for (group, _), count in zip(measured, tested, strict=True)
        ]
        axes.set_yticks(range(len(texts)), texts, fontsize=8)
        axes.set_ylim(len(texts) - 0.5, -0.5)
        label_axes(axes, f"final {LOSS}", "configuration")
        axes.ticklabel_format(axis="x", useOffset=False)
        legend_below(figure, axes)
        caption = (
            "Test loss after the last round, a point per run; lines join runs of one seed. With more than "
            f"{MOST_LINES} seeds the lowest are shown."
        )
        name = _numbered("final_test_loss", number)
        pictures.append(Picture(name, "Final test loss by configuration and seed", caption, figure))
    return pictures


def class_names(run: RunRecord) -> dict[int, str]:
    """Length class -> its number and lengths, as far as `partition.json` tells."""
    edges = [f"{edge:g}" for edge in run.partition.get("class_edges", [])]
    unit = str(run.partition.get("class_unit", "tokens"))
    if not edges:
        return {}
    names = {
        0: f"class 0: up to {edges[0]} {unit}",
        len(edges): f"class {len(edges)}: over {edges[-1]} {unit}",
    }
    for index in range(1, len(edges)):
        names[index] = f"class {index}: over {edges[index - 1]} to {edges[index]} {unit}"
    return dict(sorted(names.items()))


def communication(groups: Sequence[Group]) -> list[Picture]:
    """Global test loss against all bytes that the simulated clients had sent and received by then."""
    curves = []
    for group in groups:
        loss, total = group.series("test/loss", "test/loss_initial"), _cumulative_bytes(group)
        if loss is not None and total and total[max(total)] > 0:
            label = with_seeds(group.label, loss.num_seeds, most_seeds(groups))
            curves.append((label, loss, np.array([total.get(int(x), 0.0) for x in loss.x])))
    pictures = []
    for number, part in enumerate(chunks(curves, MOST_LINES), start=1):
        name, size = byte_unit(max(float(sent.max()) for _, _, sent in part))
        figure, (axes,) = panels(1, height=3.6)
        for index, (label, loss, sent) in enumerate(part):
            draw_series(axes, replace(loss, x=sent / size), label, look(index))
        label_axes(axes, f"cumulative communication, up and down, all clients ({name})", LOSS)
        finish_value_axis(axes, [loss.low for _, loss, _ in part])
        positive = np.concatenate([sent[sent > 0] for _, _, sent in part])
        ends = [float(sent.max()) for _, _, sent in part]
        if positive.size and max(ends) / min(ends) > 20:
            axes.set_xscale("log")
        if len(part) > 1:
            legend_below(figure, axes)
        else:
            title(axes, part[0][0], 100)
        caption = (
            "Bytes of adapters that the simulated clients sent and received, added up over rounds, against the global "
            f"test loss then. {OVER_SEEDS}"
        )
        pictures.append(
            Picture(_numbered("communication", number), "Communication against loss", caption, figure)
        )
    return pictures


def _cumulative_bytes(group: Group) -> dict[int, float]:
    """Rounds completed -> bytes of both directions so far, mean over seeds."""
    by_round: dict[int, list[float]] = {}
    for run in group.runs:
        up, down = run.values("comm/uplink_bytes"), run.values("comm/downlink_bytes")
        total = 0.0
        for index in sorted(up.keys() & down.keys()):
            total += up[index] + down[index]
            by_round.setdefault(index + 1, []).append(total)
    return {index: float(np.mean(values)) for index, values in by_round.items()}


def time_breakdown(groups: Sequence[Group]) -> list[Picture]:
    """Mean seconds of a round by phase, a bar per group."""
    found = [(group, seconds) for group in groups if (seconds := _phase_seconds(group))]
    if not found:
        return []
    names = [phase for phase in PHASES if any(phase in seconds for _, seconds in found)]
    names += sorted({phase for _, seconds in found for phase in seconds} - {*names, "round_s", "rest"})
    names += ["rest"] if any(seconds.get("rest", 0.0) > 0 for _, seconds in found) else []
    most = most_seeds(groups)
    labels = [
        with_seeds(group.label, group.seeds_with(lambda run: mean_of(run, "time/round_s")), most)
        for group, _ in found
    ]
    texts = [textwrap.fill(plain(label), 44) for label in labels]
    figure, (axes,) = panels(1, height=0.8 + sum(max(0.4, 0.18 * (text.count("\n") + 1)) for text in texts))
    y = np.arange(len(found))[::-1]
    left = np.zeros(len(found))
    for index, phase in enumerate(names):
        width = np.array([seconds.get(phase, 0.0) for _, seconds in found])
        axes.barh(y, width, left=left, label=phase.removesuffix("_s"), color=COLOURS[index % len(COLOURS)],
                  hatch=HATCHES[index % len(HATCHES)], edgecolor="white", linewidth=0.4, height=0.65)  # fmt: skip
        left += width
    spreads = [group.spread(lambda run: mean_of(run, "time/round_s")) for group, _ in found]
    for place, spread in zip(y, spreads, strict=True):
        if spread is not None and spread.count > 1:
            reach = np.array([[spread.mean - spread.low], [spread.high - spread.mean]])
            axes.errorbar([spread.mean], [place], xerr=yerror_of(reach), color="black", capsize=3, fmt="none")
    axes.set_yticks(y, texts, fontsize=8)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.grid(visible=False, axis="y")
    label_axes(axes, "seconds per round", "configuration")
    figure_legend(figure, *axes.get_legend_handles_labels())
    caption = (
        "Mean seconds of a round by phase, over rounds and seeds; rank 0's clock. Whiskers: least and most mean over "
        "seeds. Runs on different machines are not comparable."
    )
    return [Picture("time_breakdown", "Time by phase", caption, figure)]


def mean_of(run: RunRecord, key: str) -> float | None:
    """Mean of a metric over the rounds that have it."""
    values = list(run.values(key).values())
    return float(np.mean(values)) if values else None


def _phase_seconds(group: Group) -> dict[str, float]:
    """Phase -> mean seconds per round; `rest` is what no phase accounts for."""
    keys = sorted(
        {
            key
            for run in group.runs
            for record in run.metrics
            for key in record
            if re.fullmatch(r"time/\w+_s", key)
        }
    )
    seconds = {}
    for key in keys:
        spread = group.spread(lambda run, key=key: mean_of(run, key))  # type: ignore[misc]
        if spread is not None:
            seconds[key.removeprefix("time/")] = spread.mean
    if "round_s" in seconds:
        rest = 2 * seconds["round_s"] - sum(seconds.values())
        seconds["rest"] = rest if rest > 0.005 * seconds["round_s"] else 0.0
    return seconds


def _class_series(group: Group) -> dict[int, Series]:
    """Length class -> its loss by round."""
    series = {index: group.series(key) for index, key in _class_keys(group).items()}
    return {index: line for index, line in series.items() if line is not None}


def _class_losses_at_end(group: Group) -> dict[int, Spread]:
    """Length class -> its loss in the last round of each run that measured it."""
    spreads = {
        index: group.spread(lambda run, key=key: next(reversed(run.values(key).values()), None))  # type: ignore[misc]
        for index, key in _class_keys(group).items()
    }
    return {index: spread for index, spread in spreads.items() if spread is not None}


def _any_class_loss(run: RunRecord, group: Group) -> float | None:
    """Of the last round, the loss of one of the length classes that the run measured."""
    losses = (next(reversed(run.values(key).values()), None) for key in _class_keys(group).values())
    return next((loss for loss in losses if loss is not None), None)


def _class_keys(group: Group) -> dict[int, str]:
    """Length class -> name of its loss, for the classes that some run measured."""
    pattern = re.compile(r"test/loss_length_class_(\d+)")
    names = {key for run in group.runs for record in run.metrics for key in record}
    found = sorted((int(match[1]), match[0]) for name in names if (match := pattern.fullmatch(name)))
    return dict(found)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}_{number}"
