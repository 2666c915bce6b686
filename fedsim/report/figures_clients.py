"""Figures of single runs: test loss of chosen clients, singular values of the average update."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from fedsim.report.figures_rounds import SAME_LOSS
from fedsim.report.folders import ROUND, RunRecord
from fedsim.report.groups import Group, seed_of
from fedsim.report.style import (
    LOSS,
    MOST_LINES,
    ROUNDS,
    Picture,
    chunks,
    label_axes,
    legend_below,
    legend_of_all,
    look,
    panels,
    rounds_axis,
    title,
)

NUM_CURVES = 3
"""Clients in a panel where none are chosen, as in arXiv 2502.18910, figures 8 and 9."""

MOST_PANELS = 6
GLOBAL_LOSS = "global test loss"
BEFORE_TRAINING = "global model on the clients' test examples"
COHORT_MEAN = "mean of the cohort"
THIN_LINES = {
    GLOBAL_LOSS: "The thin line 'global test loss' is the global model's, on the examples that clients are tested on.",
    BEFORE_TRAINING: "The thin line 'global model on the clients' test examples' is the mean over a round's clients "
    "before local training, of what they received and on the examples that they are tested on: the global test loss is "
    "on others (evaluation.client_test, evaluation.max_client_test_examples).",
    COHORT_MEAN: "The thin line 'mean of the cohort' is over a round's clients after local training, since there is no "
    "global model.",
}
"""Name of a thin line -> what it is."""

FIRST_SEED = "Of several seeds the lowest is shown, because a client has other texts under another seed."


def client_curves(groups: Sequence[Group], client_ids: Sequence[int] | None = None) -> list[Picture]:
    """Test loss after local training of single clients by round, a panel per group.

    Args:
        groups: of the report.
        client_ids: whom to show; None for the `NUM_CURVES` clients that were tested in most groups and most often,
            of equals the lowest ids. A group that tested none of those has a choice of its own.
    """
    chosen = _tested_most([group.first for group in groups]) if client_ids is None else client_ids
    found = []
    for group in groups:
        curves = _curves(group.first, chosen)
        if not curves and client_ids is None:
            curves = _curves(group.first, _tested_most([group.first]))
        if curves:
            found.append((group, curves))
    pictures = []
    for number, part in enumerate(chunks(found, MOST_PANELS), start=1):
        figure, axes = panels(len(part), sharey=True)
        clients = sorted({client_id for _, curves in part for client_id in curves})
        looks = {client_id: look(index) for index, client_id in enumerate(clients)}
        for one, (group, curves) in zip(axes, part, strict=True):
            _draw_curves(one, group.first, curves, looks)
            title(one, f"{group.label} {seed_of(group.first)}", 55 if len(part) > 1 else 100)
            label_axes(one, ROUNDS, LOSS)
            one.tick_params(labelbottom=True, labelleft=True)
            one.ticklabel_format(axis="y", useOffset=False)
            rounds_axis(one)
            if len(clients) > MOST_LINES:  # looks come again
                one.legend(fontsize=7, handlelength=3.0)
        if len(clients) <= MOST_LINES:
            legend_of_all(figure, axes)
        caption = (
            f"Test loss of single clients after local training, in the rounds in which they took part. {FIRST_SEED} "
            f"{_thin_text([group.first for group, _ in part])}"
        )
        name = "client_curves" if number == 1 else f"client_curves_{number}"
        pictures.append(Picture(name, "Test loss of single clients", caption, figure))
    return pictures


def spectra(groups: Sequence[Group]) -> list[Picture]:
    """Singular values of the average update in the first, the middle and the last round, a panel per group."""
    found = [group for group in groups if _rounds_with_values(group.first)]
    pictures = []
    for number, part in enumerate(chunks(found, MOST_PANELS), start=1):
        figure, axes = panels(len(part), sharey=True)
        for one, group in zip(axes, part, strict=True):
            for index, (label, (mean, low, high)) in enumerate(_spectrum_lines(group.first)):
                x = np.arange(1, len(mean) + 1)
                style = look(index)
                one.plot(x, mean, label=label, markevery=max(1, len(x) // 12), **style)
                one.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            one.set_yscale("log")
            title(one, f"{group.label} {seed_of(group.first)}", 55 if len(part) > 1 else 100)
            label_axes(one, "index of the singular value", "singular value")
            one.tick_params(labelbottom=True, labelleft=True)
            rounds_axis(one)
            if len(part) > 1:
                one.legend(fontsize=7, handlelength=3.0)
        if len(part) == 1:
            legend_below(figure, axes[0])
        caption = (
            "Singular values of the average update, largest first: geometric mean over the modules with equally many, "
            "bands from the least to the most. A line ends where the first of its modules has no more above 0; modules "
            "without any are left out. First, middle and last round, or the last alone where that were more than "
            f"{MOST_LINES} lines. Of several seeds the lowest is shown."
        )
        name = "spectra" if number == 1 else f"spectra_{number}"
        pictures.append(Picture(name, "Singular values of the average update", caption, figure))
    return pictures


def _tested_most(runs: Sequence[RunRecord]) -> list[int]:
    """Ids of the clients that most runs have tested, of equals those that were tested most often; ascending."""
    tested = [run.clients["client_id"][np.isfinite(run.clients["test_loss_after"])] for run in runs]
    ids, num_runs = np.unique(np.concatenate([np.unique(one) for one in tested]), return_counts=True)
    times = np.bincount(np.searchsorted(ids, np.concatenate(tested)), minlength=ids.size)
    most: list[int] = ids[np.lexsort((ids, -times, -num_runs))][:NUM_CURVES].tolist()
    return sorted(most)


def _tests_alike(run: RunRecord) -> bool:
    """Whether clients are tested on the examples of the global test loss, all of them.

    Run folders do not hold the number of test examples, which decides whether a limit drops any. But the global model
    has one loss on one set: that of the clients' tests before training is then the global one of the round before.
    """
    if run.config["evaluation.client_test"] != "common":
        return False
    if all(run.config[f"evaluation.max_{whose}test_examples"] is None for whose in ("", "client_")):
        return True
    before = run.values("fairness/test_loss_mean_before")
    known = {index + 1: loss for index, loss in run.values("test/loss").items()}
    known |= run.values("test/loss_initial")
    shared = before.keys() & known.keys()
    return bool(shared) and all(
        math.isclose(before[index], known[index], rel_tol=SAME_LOSS) for index in shared
    )


def _thin_line(run: RunRecord) -> tuple[str, dict[int, float]]:
    """What single clients are compared with: its name, and rounds completed -> loss."""
    after = {index + 1: loss for index, loss in run.values("test/loss").items()}
    if not run.values("test/loss_initial"):
        return COHORT_MEAN, after  # on the clients' tests, as there is no global model
    if _tests_alike(run):
        return GLOBAL_LOSS, after
    # before a round the clients hold the model of all rounds until then
    return BEFORE_TRAINING, run.values("fairness/test_loss_mean_before")


def _thin_text(runs: Sequence[RunRecord]) -> str:
    """The sentences of a caption about the thin lines that there are."""
    names = [name for name, line in map(_thin_line, runs) if line]
    return " ".join(THIN_LINES[name] for name in THIN_LINES if name in names)


def _client_name(client_id: int) -> str:
    """The virtual client that holds the data of all has a negative id."""
    return f"client {client_id}" if client_id >= 0 else "all clients' data together"


def _draw_curves(
    axes: Axes, run: RunRecord, curves: Mapping[int, "Curve"], looks: Mapping[int, Mapping[str, Any]]
) -> None:
    """A line per client, and a thin one for the run's own test loss."""
    for client_id, (x, loss) in curves.items():
        every = max(1, len(x) // 15)
        axes.plot(x, loss, label=_client_name(client_id), markevery=every, **looks[client_id])
    name, average = _thin_line(run)
    if average:
        rounds = sorted(average)
        thin: dict[str, Any] = {"color": "#555555", "linewidth": 1.0, "marker": ".", "markersize": 3}
        axes.plot(rounds, [average[index] for index in rounds], label=name, **thin)


Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def _curves(run: RunRecord, client_ids: Sequence[int]) -> dict[int, Curve]:
    """Client -> rounds completed and test losses, rounds ascending; clients that were never tested are left out."""
    tested = np.isfinite(run.clients["test_loss_after"])
    clients, rounds = run.clients["client_id"][tested], run.clients[ROUND][tested]
    losses = run.clients["test_loss_after"][tested]
    curves = {}
    for client_id in client_ids:
        mine = np.flatnonzero(clients == client_id)
        mine = mine[np.argsort(rounds[mine], kind="stable")]
        if mine.size:
            curves[client_id] = (rounds[mine].astype(np.float64) + 1, losses[mine])
    return curves


def _rounds_with_values(run: RunRecord) -> list[int]:
    """Rounds, ascending, in which some module has a positive singular value."""
    return sorted(
        index
        for index, modules in run.spectra.items()
        if any(value > 0 for values in modules.values() for value in values)
    )


def _spectrum_lines(run: RunRecord) -> list[tuple[str, "Band"]]:
    """Lines of a panel: for each round shown one for each number of singular values that modules have there."""
    rounds = _rounds_with_values(run)
    shown = sorted({rounds[0], rounds[len(rounds) // 2], rounds[-1]})
    by_round = {at: _by_length(run.spectra[at]) for at in shown}
    if sum(map(len, by_round.values())) > MOST_LINES:
        by_round = {rounds[-1]: by_round[rounds[-1]]}
    lines = []
    for at, by_length in by_round.items():
        commonest = sorted(by_length, key=lambda length: -len(by_length[length]))[:MOST_LINES]
        for length in sorted(commonest):
            number = len(by_length[length])
            of = f", {number} module{'s' * (number != 1)} of {length} values" if len(by_length) > 1 else ""
            lines.append((f"round {at + 1}{of}", _over_modules(by_length[length])))
    return lines


def _by_length(modules: Mapping[str, Sequence[float]]) -> dict[int, list[Sequence[float]]]:
    """Number of recorded singular values -> those of the modules that have as many, and some above 0."""
    found: dict[int, list[Sequence[float]]] = {}
    for values in modules.values():
        if any(value > 0 for value in values):
            found.setdefault(len(values), []).append(values)
    return found


Band = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _over_modules(values: Sequence[Sequence[float]]) -> Band:
    """Geometric mean, least and most by index, as far as each of the modules has a positive singular value.

    Beyond that the mean would be over fewer modules, and could rise.
    """
    table = np.array(values, dtype=np.float64)
    table = np.log(table[:, : int((table > 0).sum(axis=1).min())])
    return np.exp(table.mean(axis=0)), np.exp(table.min(axis=0)), np.exp(table.max(axis=0))
