"""Methods by resource distribution: tables 2 to 4 of arXiv 2402.11505, from run folders.

They appear where runs say how LoRA ranks are distributed over clients.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from fedsim.report.arms import HOMOGENEOUS, Row, bench_of
from fedsim.report.cells import (
    MISSING,
    ROUGE,
    Figure,
    at_end,
    hundredfold,
    mean_at_end,
    of_runs,
    plus_minus,
    seeds_of,
)
from fedsim.report.folders import RunRecord
from fedsim.report.groups import Group
from fedsim.report.tables import Table, amount_of_bytes

CONVERGENCE = 0.75
"""Of the improvement of the arm that improved least: the default target, as the paper's is at about 75 %."""


def methods(columns: Sequence[str], rows: Sequence[Row]) -> list[Table]:
    """Scores by method and resource distribution (table 2): one table for each kind of score that a run has."""
    tables = []
    arms = [group for row in rows for group in row.cells.values()]
    for key, what in ROUGE.items():
        if any(group.spread(at_end(key)) for group in arms):
            title = f"Rouge-L {what} by method and resource distribution"
            name = "rouge_by_method" if key == "test/rougeL" else "rouge_tf_by_method"
            tables.append(
                _by_method(columns, rows, hundredfold(at_end(key)), "{:.2f}", name, title, _ROUGE_NOTE)
            )
    if any(group.spread(at_end("test/loss")) for group in arms):
        title = "Test loss by method and resource distribution"
        tables.append(
            _by_method(columns, rows, at_end("test/loss"), "{:.4f}", "loss_by_method", title, _LOSS_NOTE)
        )
    return tables


_CELLS = (
    " after the last round, or that of the exported state of a run with early stopping: mean ± sample standard "
    "deviation over seeds; in brackets the difference to the homogeneous arm of the row, taken seed by seed. FedAvg is "
    "averaging of factors after local SGD, FedIT after AdamW, as in arXiv 2402.11505. Where a homogeneous cell names "
    "another method in brackets, no homogeneous run of the row's own method is there, and that one stands in, as in "
    "the paper's table 2."
)
_ROUGE_NOTE = (
    "Rouge-L without stemmer, times 100, on the global test set; every test example counts the same, so that an "
    f"unseen client (task) counts by its number of test examples. Value{_CELLS}"
)
_LOSS_NOTE = f"Test loss of the global model in nats per label token{_CELLS} Lower is better."


def _by_method(
    columns: Sequence[str], rows: Sequence[Row], figure: Figure, shown: str, name: str, title: str, note: str
) -> Table:
    lines = []
    for row in rows:
        cells = [_cell(row, column, figure, shown) for column in columns]
        if any(cell != MISSING for cell in cells):
            lines.append((row.label, seeds_of(row.cells.values()), *cells))
    return Table(name, title, ("method", "seeds", *columns), tuple(lines), note)


def _cell(row: Row, column: str, figure: Figure, shown: str) -> str:
    """`mean ± std (difference ± std)`."""
    group = row.cells.get(column)
    spread = None if group is None else group.spread(figure)
    if group is None or spread is None:
        return MISSING
    if math.isnan(spread.mean):
        return "not finite"
    text = plus_minus(spread, shown) + ("" if group.is_finished else " unfinished") + of_runs(group, spread)
    if group is row.homogeneous:
        return f"{text} ({row.borrowed})" if row.borrowed else text
    if row.homogeneous is None:
        return text
    return f"{text} ({_difference(group, row.homogeneous, figure, shown)})"


def _difference(group: Group, other: Group, figure: Figure, shown: str) -> str:
    spread = group.difference(other, figure)
    if spread is None or math.isnan(spread.mean):
        return "no seed in common"
    return plus_minus(spread, shown.replace("{:", "{:+"))


def gains_by_category(rows: Sequence[Row]) -> list[Table]:
    """Gain of Rouge-L over the homogeneous arm by category of the unseen tasks (table 3): a table for each method."""
    tables: list[Table] = []
    for key, what in ROUGE.items():
        for row in rows:
            table = _gains(row, f"{key}_category/", what)
            if table is not None:
                name = f"gain_by_category{'_tf' * key.endswith('_tf')}_{len(tables) + 1}"
                tables.append(replace(table, name=name, title=f"{table.title}: {row.label}"))
    return tables


def _gains(row: Row, prefix: str, what: str) -> Table | None:
    base = row.homogeneous
    others = {column: group for column, group in row.cells.items() if group is not base}
    if base is None or not others:
        return None
    names = sorted({name for group in (base, *others.values()) for name in _categories(group, prefix)})
    if not names:
        return None

    def line(figure: Figure) -> tuple[str, ...]:
        mean = base.spread(figure)
        text = MISSING if mean is None else plus_minus(mean, "{:.2f}")
        seeds = sum(figure(run) is not None for run in base.runs)
        return str(seeds), text, *(_gain(group, base, figure) for group in others.values())

    lines = [(name, *line(hundredfold(at_end(prefix + name)))) for name in names]
    lines.append(("mean over categories", *line(hundredfold(mean_at_end(prefix, names)))))
    note = (
        f"Rouge-L {what}, times 100, of the exported state, on unseen tasks of the category. Seeds: runs of the "
        f"homogeneous arm{f' ({row.borrowed})' if row.borrowed else ''} that tested it, since a seed may hold out "
        "others. Then that arm, and what the others have beyond it, seed by seed; mean ± sample standard deviation "
        "over seeds. The last line is over all categories that a run tested, each weighed alike."
    )
    title = f"Gain over homogeneous by category, Rouge-L {what}"
    return Table("", title, ("category", "seeds", HOMOGENEOUS, *others), tuple(lines), note)


def _gain(group: Group, base: Group, figure: Figure) -> str:
    return MISSING if group.spread(figure) is None else _difference(group, base, figure, "{:.2f}")


def _categories(group: Group, prefix: str) -> list[str]:
    found = {key for run in group.runs for record in run.metrics for key in record if key.startswith(prefix)}
    return sorted(key.removeprefix(prefix) for key in found if not key.endswith("/not_finite"))


def rounds_to_target(rows: Sequence[Row], target_loss: float | None) -> list[Table]:
    """Rounds to a target loss and their cost beside homogeneous clients (table 4).

    Args:
        rows: of the report.
        target_loss: None for `CONVERGENCE` of the way of the arm that improved least, among the arms with equal model,
            data and evaluation.
    """
    arms = [(row, column, group) for row in rows for column, group in row.cells.items()]
    targets = _targets([group for _, _, group in arms], target_loss)
    lines = [
        _cost_line(row, column, group, targets[bench_of(group)])
        for row, column, group in arms
        if bench_of(group) in targets
    ]
    if not lines:
        return []
    head = (
        "method",
        "distribution",
        "target loss",
        "rounds R",
        "seconds a round",
        "relative",
        "bytes a round",
        "relative",
        "trained parameters a client",
        "relative",
        "R x seconds",
        "R x bytes",
    )
    source = (
        "was given"
        if target_loss is not None
        else f"is the loss at {CONVERGENCE:.0%} of the way from the loss before training to the best loss of the arm "
        "that improved least, among arms with equal model, data and evaluation (--target-loss sets another)"
    )
    note = (
        f"The target {source}. R: rounds after which the global test loss is at the target or below for the first "
        "time, mean ± sample standard deviation over the seeds that reached it, which are counted where not all did; "
        "a loss is known every evaluation.every_rounds rounds. Cost of a round, mean over rounds and seeds: seconds as "
        "measured, evaluation of the global model not included; bytes of both directions, all clients; trained "
        "parameters, mean over clients and rounds. Relative: to the row's homogeneous arm. The last two columns are R "
        "times the relative cost, in rounds of the homogeneous arm. Seconds of runs on different machines, or beside "
        "other work, cannot be compared; bytes and parameters can."
    )
    return [Table("rounds_to_target", "Rounds to a target loss and their cost", head, tuple(lines), note)]


def _targets(arms: Sequence[Group], target_loss: float | None) -> dict[str, float]:
    """For each bench its target; none where no arm has improved."""
    by_bench: dict[str, list[float]] = {}
    for group in arms:
        # run by run, since some may have stopped before others
        first = group.spread(_loss_before)
        least = group.spread(lambda run: min(run.values("test/loss").values(), default=None))
        if first is None or least is None:
            continue
        before, best = first.mean, min(first.mean, least.mean)
        found = by_bench.setdefault(bench_of(group), [])
        if target_loss is not None:
            found.append(target_loss)
        elif best < before:
            found.append(before - CONVERGENCE * (before - best))
    return {bench: max(found) for bench, found in by_bench.items() if found}


def _loss_before(run: RunRecord) -> float | None:
    """Global test loss before training, or the first one that is known."""
    found = run.values("test/loss")
    return run.values("test/loss_initial").get(0, next(iter(found.values()), None)) if found else None


def _cost_line(row: Row, column: str, group: Group, target: float) -> tuple[str, ...]:
    reached = [rounds for run in group.runs if (rounds := rounds_to(run, target)) is not None]
    costs = [
        (_round_seconds, "{:.3g}".format),
        (_round_bytes, amount_of_bytes),
        (_parameters, "{:,.0f}".format),
    ]
    lines, ratios = [], []
    for figure, shown in costs:
        cost = group.spread(figure)
        base = None if row.homogeneous is None else row.homogeneous.spread(figure)
        ratio = cost.mean / base.mean if cost is not None and base is not None and base.mean > 0 else None
        ratios.append(ratio)
        lines += [MISSING if cost is None else shown(cost.mean), MISSING if ratio is None else f"{ratio:.2f}"]
    totals = [
        MISSING if not reached or ratio is None else f"{statistics.fmean(reached) * ratio:.1f}"
        for ratio in ratios[:2]
    ]
    name = f"{column} ({row.borrowed})" if row.borrowed and group is row.homogeneous else column
    return row.label, name, f"{target:.4f}", _rounds_text(reached, len(group.runs)), *lines, *totals


def _rounds_text(reached: Sequence[int], num_runs: int) -> str:
    if not reached:
        return "not reached"
    text = f"{statistics.fmean(reached):.3g}"
    if len(set(reached)) > 1:
        text += f" ± {statistics.stdev(reached):.2g}"
    return text if len(reached) == num_runs else f"{text} ({len(reached)} of {num_runs} seeds)"


def rounds_to(run: RunRecord, target_loss: float) -> int | None:
    """Rounds completed when the global test loss was first at most this; None if it never was."""
    before = run.values("test/loss_initial").get(0)
    if before is not None and before <= target_loss:
        return 0
    return min(
        (index + 1 for index, loss in run.values("test/loss").items() if loss <= target_loss), default=None
    )


def _round_seconds(run: RunRecord) -> float | None:
    """Mean over rounds of what a round took without the global test."""
    whole, tests = run.values("time/round_s"), run.values("time/evaluate_s")
    return statistics.fmean(whole[at] - tests.get(at, 0.0) for at in whole) if whole else None


def _round_bytes(run: RunRecord) -> float | None:
    up, down = run.values("comm/uplink_bytes"), run.values("comm/downlink_bytes")
    both = up.keys() & down.keys()
    return statistics.fmean(up[at] + down[at] for at in both) if both else None


def _parameters(run: RunRecord) -> float | None:
    trained = run.clients["trained_parameters"]
    return float(trained.mean()) if trained.size else None
