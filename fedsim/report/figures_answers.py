"""Scores of the global model's answers by round, next to its loss."""

from collections.abc import Sequence
from dataclasses import replace

from fedsim.report.groups import Group, Series, most_seeds, with_seeds
from fedsim.report.style import (
    LOSS,
    MOST_LINES,
    ROUNDS,
    Picture,
    chunks,
    draw_series,
    label_axes,
    legend_of_all,
    look,
    panels,
    rounds_axis,
    title,
)

SCORES = {
    "test/rougeL{}": "Rouge-L, no stemmer",
    "test/rougeL_stem{}": "Rouge-L, stemmer",
    "test/exact_match{}": "exact match",
    "test/loss": "test loss",
}
"""Metric, with a place for what its answers are -> title of its panel."""

KINDS = {"": "generated answers", "_tf": "teacher-forced guesses"}


def answers(groups: Sequence[Group]) -> list[Picture]:
    """Rouge-L with and without stemmer, exact match and loss by round; a figure for each kind of answers."""
    pictures = []
    for suffix, what in KINDS.items():
        found = [group for group in groups if group.series(f"test/rougeL{suffix}")]
        for number, part in enumerate(chunks(found, MOST_LINES), start=1):
            name = f"answers{suffix}" if number == 1 else f"answers{suffix}_{number}"
            pictures.append(_picture(part, suffix, name, what, most_seeds(groups)))
    return pictures


def _picture(groups: Sequence[Group], suffix: str, name: str, what: str, most: int) -> Picture:
    """`most` seeds has the group of the report that has most; all panels name those that have the Rouge-L."""
    keys = [key.format(suffix) for key in SCORES]
    shown = [
        (key, heading)
        for key, heading in zip(keys, SCORES.values(), strict=True)
        if any(group.series(key) for group in groups)
    ]
    rouge = [group.series(keys[0]) for group in groups]
    labels = [
        with_seeds(group.label, series.num_seeds if series else 0, most)
        for group, series in zip(groups, rouge, strict=True)
    ]
    figure, axes = panels(len(shown), height=2.9)
    for one, (key, heading) in zip(axes, shown, strict=True):
        is_loss = key == "test/loss"
        for index, group in enumerate(groups):
            series = group.series(key, "test/loss_initial" if is_loss else None)
            if series is not None:
                draw_series(one, series if is_loss else _hundredfold(series), labels[index], look(index))
        title(one, heading, 55)
        label_axes(one, ROUNDS, LOSS if is_loss else "score (x 100)")
        one.ticklabel_format(axis="y", useOffset=False)
        if not is_loss:
            one.set_ylim(0.0, max(one.get_ylim()[1], 0.1))
        rounds_axis(one)
    legend_of_all(figure, axes)
    caption = (
        f"Scores of the global model's {what} on the global test set, every example alike, and its loss there. Lines "
        "are means over seeds, bands reach from the least to the most. Answers whose references hold no Latin letter "
        "or digit score 0 in Rouge-L; the table says how many there are."
    )
    return Picture(name, f"Scores of {what} by round", caption, figure)


def _hundredfold(series: Series) -> Series:
    return replace(series, mean=100.0 * series.mean, low=100.0 * series.low, high=100.0 * series.high)
