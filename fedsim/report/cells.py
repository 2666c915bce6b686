"""Figures of runs, and their mean and spread as the text of a table's cell."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from fedsim.report.folders import RunRecord
from fedsim.report.groups import Group, Spread

Figure = Callable[[RunRecord], float | None]

MISSING = "-"

ROUGE = {"test/rougeL": "of generated answers", "test/rougeL_tf": "of teacher-forced guesses"}
"""Rouge-L that weighs every test example alike, so that each unseen client counts by its test examples."""


def plus_minus(spread: Spread, shown: str) -> str:
    """`mean ± std`; the mean alone for one run, or where nothing varies."""
    if math.isnan(spread.mean):
        return "not finite"
    text = shown.format(spread.mean)
    if spread.std is None or spread.low == spread.high:
        return text
    return f"{text} ± {shown.replace(':+', ':').format(spread.std)}"


def of_runs(group: Group, spread: Spread) -> str:
    """` (2 of 3 runs)` where not all counted runs of a group have a figure, else nothing."""
    return "" if spread.count == len(group.runs) else f" ({spread.count} of {len(group.runs)} runs)"


def seeds_of(groups: Iterable[Group]) -> str:
    """Seeds of all counted runs, ascending."""
    return ", ".join(map(str, sorted({run.seed for group in groups for run in group.runs})))


def last(key: str) -> Figure:
    """A metric in the last round that measured it."""
    return lambda run: run.last(key)


def at_end(key: str) -> Figure:
    """A metric of the state that a run exported: that of the last round, but for early stopping."""
    return lambda run: run.at_end(key)


def hundredfold(figure: Figure) -> Figure:
    """The same figure times 100."""

    def times_100(run: RunRecord) -> float | None:
        value = figure(run)
        return None if value is None else 100.0 * value

    return times_100


def mean_at_end(prefix: str, names: Sequence[str]) -> Figure:
    """Mean over those metrics `prefix + name` that a run has; None where it has none."""

    def mean(run: RunRecord) -> float | None:
        values = [value for name in names if (value := run.at_end(prefix + name)) is not None]
        return statistics.fmean(values) if values else None

    return mean
