"""From run folders to a folder with figures, tables and one page."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from errno import EACCES, ENOTDIR
from pathlib import Path
from typing import Any

from fedsim.atomic import replace_folder, write_text_atomic
from fedsim.errors import RunFolderError
from fedsim.report import (
    figures_answers,
    figures_clients,
    figures_partition,
    figures_rounds,
    figures_spectra,
    tables_answers,
    tables_flexlora,
    tables_tiers,
)
from fedsim.report.arms import rows_of
from fedsim.report.folders import RunRecord, find_runs, read_run
from fedsim.report.groups import Group, baseline_of, group_runs
from fedsim.report.page import GENERATOR, html_page, markdown_page
from fedsim.report.style import Picture, house_style
from fedsim.report.tables import Table, common, parameters, results, runs_table

PAGE = "index.html"
MARKDOWN = "report.md"
FIGURES = "figures"


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a report says, before it is written.

    Attributes:
        groups: configurations, in order.
        notes: what a reader must know about the runs, and what could not be shown and why.
        tables: with texts only.
        pictures: drawn figures.
    """

    groups: tuple[Group, ...]
    notes: tuple[str, ...]
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]


def make_report(
    paths: Sequence[Path],
    client_ids: Sequence[int] | None = None,
    target_loss: float | None = None,
    modules: Sequence[str] = (),
    baseline: Mapping[str, Any] | None = None,
) -> Report:
    """Read runs and draw everything that they tell.

    Args:
        paths: run folders, or folders of run folders.
        client_ids: whose test loss to draw; None for a choice of our own.
        target_loss: for the table of rounds to a target loss; None for one that follows from the runs.
        modules: names, or ends of dotted names, of the modules whose singular values to draw one by one; empty for a
            choice of our own.
        baseline: keys and values of the configuration that the differences of losses are taken to; None for a choice
            of our own.

    Raises:
        RunFolderError: no run with a round, or a damaged file.
        ConfigError: not one configuration has the values of `baseline`.
    """
    records = [read_run(path) for path in find_runs(paths)]
    groups = group_runs(records)
    if not groups:
        raise RunFolderError(
            f"a report needs a run with at least one recorded round, got {len(records)} without: "
            f"{', '.join(f'{record.path} ({record.status})' for record in records[:5])}"
        )
    compared_with = baseline_of(groups, baseline)
    pictures: list[Picture] = []
    missing: list[str] = []
    with house_style():
        for made, why_not in (
            (figures_rounds.global_loss(groups), "global test loss: no round recorded a finite one"),
            (figures_rounds.train_loss(groups), ""),
            (figures_rounds.final_loss(groups), ""),
            (figures_answers.answers(groups), ""),
            (figures_partition.partitions(groups), "partition: no run has a partition.json"),
            (
                figures_partition.dirichlet_scatter(groups),
                "clients and classes: partition.json has no class counts",
            ),
            (figures_clients.client_curves(groups, client_ids), _no_curves(client_ids)),
            (
                figures_rounds.fairness(groups),
                "fairness: no round recorded it, as without evaluation.client_test",
            ),
            (
                figures_rounds.class_loss_by_round(groups),
                "loss by length class: no round recorded a finite one",
            ),
            (figures_rounds.class_loss_at_end(groups), ""),
            (
                figures_rounds.communication(groups),
                "communication: no test loss, or no bytes sent, were recorded",
            ),
            (figures_rounds.time_breakdown(groups), "time by phase: no round recorded it"),
            (figures_spectra.rank_collapse(groups), ""),
            (figures_spectra.energy_kept(groups), ""),
            (figures_clients.spectra(groups), ""),
            (figures_spectra.spectra_by_module(groups, modules), _no_modules(modules)),
        ):
            pictures += made
            if not made and why_not:
                missing.append(f"Not shown: {why_not}.")
    pictures = _numbered(pictures)
    columns, rows = rows_of(groups)
    tables = (
        *common(groups),
        results(groups, compared_with),
        *tables_flexlora.methods(columns, rows),
        *tables_flexlora.gains_by_category(rows),
        *tables_answers.answers(groups),
        *tables_flexlora.rounds_to_target(rows, target_loss),
        *tables_tiers.tiers(groups),
        *figures_spectra.truncation(groups, modules),
        parameters(groups),
        runs_table(groups),
    )
    return Report(tuple(groups), (*_run_notes(records, groups), *missing), tables, tuple(pictures))


def _numbered(pictures: Sequence[Picture]) -> list[Picture]:
    """Pictures with one title get numbers."""
    titles = [picture.title for picture in pictures]
    numbered = []
    for place, picture in enumerate(pictures):
        total, number = titles.count(picture.title), titles[: place + 1].count(picture.title)
        text = f"{picture.title} ({number} of {total})" if total > 1 else picture.title
        numbered.append(replace(picture, title=text))
    return numbered


def write_report(report: Report, out: Path) -> Path:
    """Write `index.html`, `report.md` and `figures/` (PNG and SVG) into `out`; returns the page.

    An earlier report in `out` is replaced; other files there stay.

    Raises:
        RunFolderError: `out` cannot be written, is a run folder or within one, or has files of these names that are not
            ours.
    """
    check_out(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(out, error) from error
    images = [picture.png() for picture in report.pictures]
    heading = f"fedsim report: {_counted(report)}"

    def fill(folder: Path) -> None:
        for picture, image in zip(report.pictures, images, strict=True):
            (folder / f"{picture.name}.png").write_bytes(image)
            (folder / f"{picture.name}.svg").write_bytes(picture.svg())

    # the page first: it marks the folder as ours if anything fails afterwards
    write_text_atomic(out / PAGE, html_page(heading, report.notes, report.tables, report.pictures, images))
    replace_folder(out / FIGURES, fill)
    write_text_atomic(out / MARKDOWN, markdown_page(heading, report.notes, report.tables, report.pictures))
    return out / PAGE


def _counted(report: Report) -> str:
    runs = sum(len(group.runs) for group in report.groups)
    groups = len(report.groups)
    return f"{runs} run{'s' * (runs != 1)} of {groups} configuration{'s' * (groups != 1)}"


def check_out(out: Path) -> None:
    """Refuse a folder that no report can be written to, before one is drawn; nothing is made.

    Raises:
        RunFolderError: as of `write_report`.
    """
    rule = f"--out {out} must be a folder for the report"
    try:
        if any((folder / "run.json").exists() for folder in (out, *out.absolute().parents)):
            raise RunFolderError(f"{rule}, got a run folder, or one within; choose another")
        there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR), str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(EACCES, os.strerror(EACCES), str(there))
        page = out / PAGE
        is_ours = page.is_file() and GENERATOR in page.read_text(encoding="utf-8", errors="replace")
        taken = [name for name in (PAGE, MARKDOWN, FIGURES) if (out / name).exists()]
    except OSError as error:
        raise _not_writable(out, error) from error
    if taken and not is_ours:
        raise RunFolderError(f"{rule}; it has {', '.join(taken)} that no report wrote; choose another")


def _not_writable(out: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"--out {out} must be a folder for the report that can be written ({error.strerror or error}); choose another"
    )


def _no_curves(client_ids: Sequence[int] | None) -> str:
    whom = "no client" if client_ids is None else f"none of clients {', '.join(map(str, client_ids))}"
    return f"client curves: {whom} was tested after local training, by clients.parquet of the lowest seeds"


def _no_modules(modules: Sequence[str]) -> str:
    return f"singular values of {', '.join(modules)}: no run recorded such a module" if modules else ""


def _run_notes(records: Sequence[RunRecord], groups: Sequence[Group]) -> list[str]:
    notes = [f"{record.name}: {warning}." for record in records for warning in record.warnings]
    notes += [
        f"{record.name}: no round recorded (status {record.status}{_why(record)}); left out."
        for record in records
        if not record.metrics
    ]
    for group in groups:
        for run in (*group.runs, *group.left_out):
            if not run.is_finished:
                use = "left out of means and figures" if run in group.left_out else "shown as far as it came"
                rounds = f"{len(run.metrics)} of {run.config['run.rounds']} rounds"
                notes.append(f"{run.name}: status {run.status} after {rounds}{_why(run)}; {use}.")
            lost = [
                record["round_index"] + 1 for record in run.metrics if record.get("test/loss", 0.0) is None
            ]
            if lost:
                notes.append(
                    f"{run.name}: the test loss was not finite after round {', '.join(map(str, lost[:5]))}."
                )
            if run.last("test/loss") is not None and run.at_end("test/loss") is None:
                notes.append(f"{run.name}: {_why_untested(run)}, so tables of scores leave it out.")
            if run.is_finished and _lacks_rounds(run):
                notes.append(
                    f"{run.name}: finished, but metrics.jsonl has {len(run.metrics)} of {run.config['run.rounds']} "
                    "rounds; what is said of the last round is of the last one there."
                )
        notes += _group_notes(group)
    return notes


def _group_notes(group: Group) -> list[str]:
    notes = []
    seeds = [run.seed for run in group.runs]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        names = ", ".join(run.name for run in group.runs if run.seed in twice)
        notes.append(
            f"{group.label}: seed {', '.join(map(str, twice))} stands for several runs ({names}); "
            "the spread is too small."
        )
    if len({len(run.metrics) for run in group.runs}) > 1:
        notes.append(
            f"{group.label}: its runs have different numbers of rounds, so a mean is over those that came that far."
        )
    # the fingerprint of the data covers the partition, which differs by seed
    bases = {(run.info.get("inputs") or {}).get("base") for run in group.runs}
    if len(bases - {None}) > 1:
        notes.append(f"{group.label}: its runs had different base weights (run.json, inputs).")
    return notes


def _lacks_rounds(run: RunRecord) -> bool:
    return run.config["early_stopping.metric"] == "off" and len(run.metrics) < int(run.config["run.rounds"])


def _why_untested(run: RunRecord) -> str:
    rounds = run.info["early_stopping"]["exported_after_rounds"]
    if rounds and all(record["round_index"] != rounds - 1 for record in run.metrics):
        return f"metrics.jsonl lacks round {rounds}, after which it exported its state"
    return (
        "the state that it exported was never tested on the global test set (evaluation.every_rounds=1, or an "
        "early_stopping.metric of the test set, tests it)"
    )


def _why(record: RunRecord) -> str:
    return f": {' '.join(record.reason.split())[:200]}" if record.reason else ""
