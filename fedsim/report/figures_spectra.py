"""Singular values of single modules, and what truncation to the tiers' LoRA ranks keeps of them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from fedsim.report.figures_rounds import OVER_SEEDS, line_pictures
from fedsim.report.folders import RunRecord
from fedsim.report.groups import Group, Series, most_seeds, seed_of, with_seeds
from fedsim.report.style import (
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
from fedsim.report.tables import Table

MOST_PANELS = 6
MOST_RANKS = 8
"""Columns of the table of truncation errors."""

USUAL_MODULE = "k_proj"
"""The module of arXiv 2402.11505, figure 8."""

KEPT = re.compile(r"spectrum/energy_kept_rank_(\d+)")


def spectra_by_module(groups: Sequence[Group], modules: Sequence[str] = ()) -> list[Picture]:
    """Singular values of chosen modules after the last round, a panel per group (arXiv 2402.11505, figure 8)."""
    found = [(group, chosen) for group in groups if (chosen := chosen_modules(group.first, modules))]
    pictures = []
    for number, part in enumerate(chunks(found, MOST_PANELS), start=1):
        figure, axes = panels(len(part), sharey=True)
        for one, (group, chosen) in zip(axes, part, strict=True):
            run = group.first
            values = run.spectra[max(run.spectra)]
            ranks: set[int] = set()
            for index, module in enumerate(chosen[:MOST_LINES]):
                kept = np.array([value for value in values[module] if value > 0])
                x = np.arange(1, kept.size + 1)
                one.plot(x, kept, label=short_module(module), markevery=max(1, x.size // 12), **look(index))
                ranks.update(ranks_of(run, module))
            for index, rank in enumerate(sorted(ranks)):
                label = "ranks of the tiers" if index == 0 else None
                one.axvline(rank, color="#555555", linewidth=0.8, linestyle=":", label=label)
            one.set_yscale("log")
            title(one, f"{group.label} {seed_of(run)}", 55 if len(part) > 1 else 100)
            label_axes(one, "index of the singular value", "singular value")
            one.tick_params(labelbottom=True, labelleft=True)
            rounds_axis(one)
        legend_of_all(figure, axes)
        caption = (
            "Singular values of the average update of single modules after the last round, largest first; those at 0 "
            "are left out. Dotted lines: LoRA ranks of the resource tiers; what stands right of one is what a "
            "client of that rank does not get. Of several seeds the lowest is shown, of many blocks the first, the "
            "middle and the last."
        )
        name = "spectra_by_module" if number == 1 else f"spectra_by_module_{number}"
        pictures.append(Picture(name, "Singular values by module", caption, figure))
    return pictures


def energy_kept(groups: Sequence[Group]) -> list[Picture]:
    """Share of the energy that each tier's rank keeps by round, a panel per group with several ranks."""
    found = [(group, lines) for group in groups if len(lines := _kept_series(group)) > 1]
    pictures = []
    for number, part in enumerate(chunks(found, MOST_PANELS), start=1):
        figure, axes = panels(len(part), sharey=True)
        ranks = sorted({rank for _, lines in part for rank in lines})
        for one, (group, lines) in zip(axes, part, strict=True):
            for rank, series in lines.items():
                label = with_seeds(f"LoRA rank {rank}", series.num_seeds, group.num_seeds)
                draw_series(one, series, label, look(ranks.index(rank)))
            num_seeds = max(series.num_seeds for series in lines.values())
            heading = with_seeds(group.label, num_seeds, most_seeds(groups))
            title(one, heading, 55 if len(part) > 1 else 100)
            label_axes(one, ROUNDS, "share of energy kept")
            one.tick_params(labelbottom=True, labelleft=True)
            one.ticklabel_format(axis="y", useOffset=False)
            rounds_axis(one)
            if len(ranks) > MOST_LINES:  # looks come again
                one.legend(fontsize=7, handlelength=3.0)
        if len(ranks) <= MOST_LINES:
            legend_of_all(figure, axes)
        caption = (
            "Share of the squared singular values of the average update that the best approximation of a tier's LoRA "
            "rank keeps: mean over the modules that have this rank in some tier, over the seeds whose tiers have it "
            f"where these are counted. {OVER_SEEDS}"
        )
        name = "energy_kept" if number == 1 else f"energy_kept_{number}"
        pictures.append(Picture(name, "Energy kept at each tier's rank by round", caption, figure))
    return pictures


def rank_collapse(groups: Sequence[Group]) -> list[Picture]:
    """Energy beyond the smallest rank of any tier, and effective rank, by round; a line per group."""
    most = most_seeds(groups)
    beyond = [
        (with_seeds(group.label, series.num_seeds, most), series)
        for group in groups
        if (series := group.series_of(_beyond_smallest))
    ]
    effective = [
        (with_seeds(group.label, series.num_seeds, most), series)
        for group in groups
        if (series := group.series("spectrum/effective_rank"))
    ]
    return line_pictures(
        beyond,
        "energy_beyond_smallest_rank",
        "Rank collapse: energy beyond the smallest rank by round",
        "share of energy beyond the smallest rank",
        "Share of the squared singular values of the average update that the smallest LoRA rank of any tier cannot "
        "hold, mean over modules; where it falls towards 0 the ranks collapse (arXiv 2602.13486). Runs without "
        "tiers.json or the update's squared norm show metrics.jsonl's spectrum/energy_beyond_smallest_rank, which "
        f"takes the smallest rank of the round's cohort. {OVER_SEEDS}",
    ) + line_pictures(
        effective,
        "effective_rank",
        "Effective rank of the average update by round",
        "effective rank (mean over modules)",
        f"Effective rank of the average update as the strategy records it. {OVER_SEEDS}",
    )


def truncation(groups: Sequence[Group], modules: Sequence[str] = ()) -> list[Table]:
    """Error and energy of truncation to each tier's rank, by module, after the last round."""
    found = [(group, module) for group in groups for module in chosen_modules(group.first, modules)]
    ranks = sorted({rank for group, module in found for rank in _ranks_of_any(group, module)})[:MOST_RANKS]
    if not found or not ranks:
        return []
    lines = [
        (group.label, short_module(module), *(_truncation_cell(group, module, rank) for rank in ranks))
        for group, module in found
    ]
    head = ("configuration", "module", *(f"rank {rank}" for rank in ranks))
    note = (
        "After the last round, mean over seeds: relative error ||W - W_r|| / ||W|| (Frobenius) of the best "
        "approximation of rank r of the average update W, which is what is left beyond the top r singular values, "
        "and in brackets the share of the squared singular values that it keeps. "
        "'1 of 2 seeds': the others have no client of this rank in this module; '-': none has."
    )
    if any(not group.first.energies.get(max(group.first.spectra), {}) for group, _ in found):
        note += (
            " Runs that did not record ||W|| (spectra.jsonl, module/energy) are measured against the recorded values "
            "alone, so that their errors are too small."
        )
    return [Table("truncation", "What is left beyond each tier's rank, by module", head, tuple(lines), note)]


def _truncation_cell(group: Group, module: str, rank: int) -> str:
    def kept_of(run: RunRecord) -> float | None:
        return kept_share(run, module, rank) if rank in ranks_of(run, module) else None

    spread = group.spread(kept_of)
    error = group.spread(lambda run: _error(kept_of(run)))
    if spread is None or error is None:
        return "-"
    kept = f"{spread.mean:.1%}" if spread.mean < 0.9995 or spread.mean == 1 else "over 99.9%"
    return with_seeds(f"{error.mean:.3g} ({kept})", group.seeds_with(kept_of), group.num_seeds)


def kept_share(run: RunRecord, module: str, rank: int, round_index: int | None = None) -> float | None:
    """sum_{j <= r} s_j^2 / ||W||_F^2, in [0, 1]; None where the round has no singular values of the module.

    Args:
        run: where its record has no ||W||, the recorded singular values stand for all of W.
        module: dotted path.
        rank: r.
        round_index: None for the last round with singular values.
    """
    at = max(run.spectra, default=0) if round_index is None else round_index
    values = run.spectra.get(at, {}).get(module)
    if values is None:
        return None
    squares = [value * value for value in values]
    energy = max(run.energies.get(at, {}).get(module, 0.0), math.fsum(squares))
    return min(1.0, math.fsum(squares[:rank]) / energy) if energy > 0 else 1.0


def _error(kept: float | None) -> float | None:
    return None if kept is None else math.sqrt(max(0.0, 1.0 - kept))


def chosen_modules(run: RunRecord, names: Sequence[str] = ()) -> list[str]:
    """Modules with singular values in the last round: the named ones, of many blocks the first, middle and last.

    Args:
        run: may have no singular values at all.
        names: dotted names, or ends of them; empty for `USUAL_MODULE` or, where that has none, the first module's name.
    """
    values: Mapping[str, Sequence[float]] = run.spectra[max(run.spectra)] if run.spectra else {}
    with_values = [module for module, own in values.items() if any(value > 0 for value in own)]
    if not with_values:
        return []
    if not names:
        last_names = [module.rpartition(".")[2] for module in with_values]
        names = (USUAL_MODULE if USUAL_MODULE in last_names else last_names[0],)
    chosen: list[str] = []
    for name in names:
        own = [module for module in with_values if module == name or module.endswith("." + name)]
        places = sorted({0, len(own) // 2, len(own) - 1}) if own else []
        chosen += [own[place] for place in places if own[place] not in chosen]
    return chosen


def short_module(module: str) -> str:
    """`layers.0.self_attn.k_proj` instead of what stands before the blocks as well."""
    match = re.search(r"[^.]+\.\d+\..*$", module)
    return match[0] if match else module


def ranks_of(run: RunRecord, module: str) -> list[int]:
    """LoRA ranks of a module in the tiers that have clients, ascending."""
    last_name = module.rpartition(".")[2]
    present = [tier for tier in run.tiers if tier.get("num_clients", 1)]
    ranks = {int(rank) for tier in present for rank in tier["lora_ranks"].get(last_name, ())}
    return sorted(ranks)


def _ranks_of_any(group: Group, module: str) -> set[int]:
    """The same over all seeds of a group, each of which draws its clients' tiers anew."""
    return {rank for run in group.runs for rank in ranks_of(run, module)}


def _has_energies(run: RunRecord) -> bool:
    return bool(run.tiers) and any(run.energies.values())


def _kept_series(group: Group) -> dict[int, Series]:
    """LoRA rank -> share of energy kept by round, of the smallest ranks where there are many.

    From the singular values where the run recorded the squared norms: metrics.jsonl has a rank only in rounds in which
    a client of the cohort had it.
    """
    modules = sorted({module for run in group.runs for values in run.spectra.values() for module in values})
    ranks = {rank for module in modules for rank in _ranks_of_any(group, module)}
    if not all(_has_energies(run) for run in group.runs):
        recorded = {key for run in group.runs for record in run.metrics for key in record}
        ranks = {int(match[1]) for key in recorded if (match := KEPT.fullmatch(key))}
        lines = {
            rank: group.series(f"spectrum/energy_kept_rank_{rank}") for rank in sorted(ranks)[:MOST_LINES]
        }
    else:
        lines = {rank: group.series_of(partial(_kept_at, rank)) for rank in sorted(ranks)[:MOST_LINES]}
    return {rank: series for rank, series in lines.items() if series is not None}


def _kept_at(rank: int, run: RunRecord) -> dict[int, float]:
    """Rounds completed -> share kept at a rank, mean over the modules that have it in some tier."""
    return _mean_over_modules(run, lambda module: rank if rank in ranks_of(run, module) else None)


def _beyond_smallest(run: RunRecord) -> dict[int, float]:
    """Rounds completed -> share beyond the smallest rank of any tier, mean over modules."""
    if not _has_energies(run):
        return {
            index + 1: share for index, share in run.values("spectrum/energy_beyond_smallest_rank").items()
        }
    kept = _mean_over_modules(run, lambda module: min(ranks_of(run, module), default=None))
    return {index: 1.0 - share for index, share in kept.items()}


def _mean_over_modules(run: RunRecord, rank_of: Callable[[str], int | None]) -> dict[int, float]:
    means = {}
    for at, values in run.spectra.items():
        shares = [
            kept_share(run, module, rank, at) for module in values if (rank := rank_of(module)) is not None
        ]
        known = [share for share in shares if share is not None]
        if known:
            means[at + 1] = math.fsum(known) / len(known)
    return means
