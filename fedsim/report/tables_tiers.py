"""What clients of each resource tier train and cost: tables 5 and 6 of arXiv 2402.11505, as measured in runs."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedsim.report.cells import MISSING, Figure, last, plus_minus
from fedsim.report.folders import RunRecord
from fedsim.report.groups import DISTRIBUTION, Group
from fedsim.report.tables import NOT_RECORDED, Table, amount_of_bytes

Floats = NDArray[np.float64]

MOST_TIERS = 8
"""Groups with more are left out."""


def tiers(groups: Sequence[Group]) -> list[Table]:
    """What a client of each resource tier trains and costs (tables 5 and 6), as measured in the runs."""
    lines = [line for group in groups for line in _tier_lines(group)]
    if not lines:
        return []
    head = (
        "configuration",
        "tier",
        "LoRA ranks",
        "clients",
        "local runs",
        "trained parameters",
        "share of all",
        "sent in a round",
        "seconds a local run",
        "milliseconds a step",
        "peak memory of a process",
    )
    note = (
        "Local runs: rows of clients.parquet, over all rounds and seeds. Share of all: trained parameters over those "
        "of the base and the client's adapter. Seconds and milliseconds: mean over local runs, then mean ± sample "
        "standard deviation over seeds; the clients of a pack train together, so that a client's time is that of "
        "all who trained beside it. Peak memory is that of the whole run, of all tiers together: torch's own on a GPU, "
        "the resident set on a CPU. benchmarks/tiers.py measures one client of each tier alone."
    )
    return [Table("tiers", "Clients of each resource tier", head, tuple(lines), note)]


def _tier_lines(group: Group) -> list[tuple[str, ...]]:
    first = group.first
    is_distributed = first.config[DISTRIBUTION] is not None or bool(first.config["lora.tiers"])
    names = {tuple(tier["name"] for tier in run.tiers) for run in group.runs}
    if not is_distributed or not 0 < len(first.tiers) <= MOST_TIERS or len(names) > 1:
        return []
    return [_tier_line(group, index) for index in range(len(first.tiers))]


def _tier_line(group: Group, tier: int) -> tuple[str, ...]:
    described = group.first.tiers[tier]
    base = (group.first.info.get("parameters") or {}).get("base")
    trained = _values_of(group, tier, "trained_parameters")
    share = MISSING
    if trained.size:
        share = f"{trained.max() / (base + trained.max()):.2%}" if isinstance(base, int) else NOT_RECORDED
    peak = group.spread(last("ranks/peak_memory_mib"))
    return (
        group.label,
        str(described["name"]),
        _ranks_text(described["lora_ranks"]),
        _over_seeds(group, lambda run: float((run.tier_of == tier).sum())),
        str(trained.size),
        _span(trained, "{:,.0f}".format),
        share,
        _span(_values_of(group, tier, "uplink_bytes"), amount_of_bytes),
        _over_seeds(group, lambda run: _mean_or_none(_of_tier(run, tier, "seconds"))),
        _over_seeds(group, lambda run: _milliseconds_a_step(run, tier)),
        NOT_RECORDED if peak is None else f"{peak.mean:,.0f} MiB",
    )


def _of_tier(run: RunRecord, tier: int, column: str) -> Floats:
    """A column of clients.parquet in the rows of a tier's clients."""
    clients = run.clients["client_id"]
    known = (clients >= 0) & (clients < run.tier_of.size)  # the pooled client is of no tier
    mine = np.zeros(clients.size, dtype=bool)
    mine[known] = run.tier_of[clients[known]] == tier
    return run.clients[column][mine].astype(np.float64)


def _values_of(group: Group, tier: int, column: str) -> Floats:
    return np.concatenate([_of_tier(run, tier, column) for run in group.runs])


def _mean_or_none(values: Floats) -> float | None:
    return float(values.mean()) if values.size else None


def _milliseconds_a_step(run: RunRecord, tier: int) -> float | None:
    steps = float(_of_tier(run, tier, "steps").sum())
    return 1e3 * float(_of_tier(run, tier, "seconds").sum()) / steps if steps > 0 else None


def _over_seeds(group: Group, figure: Figure) -> str:
    spread = group.spread(figure)
    return MISSING if spread is None else plus_minus(spread, "{:.3g}")


def _ranks_text(ranks: Mapping[str, Sequence[int]]) -> str:
    """`8 everywhere`, or modules with equal ranks together: `30 on q_proj, v_proj; 200 on fc1`."""
    by_ranks: dict[str, list[str]] = {}
    for module, found in ranks.items():
        by_ranks.setdefault("/".join(map(str, found)), []).append(module)
    if len(by_ranks) == 1:
        return f"{next(iter(by_ranks))} everywhere"
    return "; ".join(f"{rank} on {', '.join(modules)}" for rank, modules in by_ranks.items())


def _span(values: Floats, shown: Callable[[float], str]) -> str:
    if not values.size:
        return MISSING
    least, most = shown(float(values.min())), shown(float(values.max()))
    return most if least == most else f"{least} to {most}"
