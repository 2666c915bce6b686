"""Tables of a report as rows of texts, and their Markdown."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.config.keys import show
from fedsim.report.figures_rounds import mean_of
from fedsim.report.folders import RunRecord
from fedsim.report.groups import DISTRIBUTION, Group, Spread, compared

NOT_RECORDED = "not recorded"


@dataclass(frozen=True, slots=True)
class Table:
    """A table; `note` says how to read it."""

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str

    def markdown(self) -> str:
        """As a Markdown table, without title and note."""
        lines = [self.head, tuple("---" for _ in self.head), *self.rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )


COMMON = {
    "data.source": "data",
    "data.subset": "subset of the data",
    "data.max_examples": "most examples used",
    "data.partition.name": "partition",
    "data.partition.dirichlet_alpha": "Dirichlet's alpha",
    "data.partition.num_clients": "clients",
    "model.name_or_path": "base model",
    "strategy.name": "strategy",
    "lora.distribution": "distribution of LoRA ranks",
    "lora.rank": "LoRA rank",
    "run.rounds": "rounds",
    "cohort.size": "clients of a round",
    "cohort.fraction": "share of clients in a round",
    "training.local_epochs": "local epochs",
    "training.local_steps": "local steps",
    "training.batch_size": "batch size",
    "training.optimizer.name": "optimizer",
    "training.optimizer.lr": "learning rate",
}
"""Keys that a reader asks for first -> what they are, in the order of the table."""


def common(groups: Sequence[Group]) -> list[Table]:
    """What all groups have in common of the keys that a reader asks for first."""
    configs = [compared(group.first.config) for group in groups]
    rows = []
    for key, meaning in COMMON.items():
        values = [config.get(key) for config in configs]
        if (
            values[0] is not None
            and all(value == values[0] for value in values)
            and not _is_idle(configs, key)
        ):
            value = values[0] if isinstance(values[0], str) else show(values[0])
            rows.append((meaning, value, key))
    if not rows:
        return []
    note = "Of the keys that are asked for first those with one value in all runs; config.yaml of a run has them all."
    return [Table("common", "Common to all runs", ("what", "value", "key"), tuple(rows), note)]


def _is_idle(configs: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether a key decides nothing in some run: the LoRA rank where tiers do, or types with ranks of their own."""
    return key == "lora.rank" and any(
        config[DISTRIBUTION] not in (None, "by_size") or config["lora.tiers"] for config in configs
    )


def results(groups: Sequence[Group], baseline: Group) -> Table:
    """Losses, fairness, rounds, bytes and seconds of each group, with their spread over seeds.

    Args:
        groups: of the report.
        baseline: one of them, which the difference of losses is taken to.
    """
    rows = []
    for group in groups:
        best = group.spread(_best_loss)
        rows.append(
            (
                group.label if group.is_finished else f"{group.label} (unfinished)",
                ", ".join(str(run.seed) for run in group.runs),
                _text(group.spread(lambda run: float(len(run.metrics))), _count),
                _text(group.spread(lambda run: run.last("test/loss")), _loss),
                _difference(group, baseline),
                _text(best, _loss) + _best_round(group),
                _text(group.spread(lambda run: run.last("test/perplexity")), _perplexity),
                _text(group.spread(lambda run: run.last("fairness/test_loss_variance")), _small),
                _text(group.spread(_all_bytes), amount_of_bytes),
                _text(group.spread(lambda run: mean_of(run, "time/round_s")), _seconds),
            )
        )
    head = (
        "configuration",
        "seeds",
        "rounds",
        "final test loss",
        "final test loss, less that of the baseline",
        "best test loss (round)",
        "final perplexity",
        "final fairness variance",
        "communication",
        "seconds per round",
    )
    note = (
        "Mean ± sample standard deviation over seeds [least, most]; a single seed has no spread. Losses in nats per "
        f"label token. The baseline is {baseline.label} (--baseline names another); the difference to it is taken seed "
        "by seed. Best over rounds (1 is the first); "
        "variance of the cohort's test losses after local training in nats² per token²; communication of all simulated "
        "clients in both directions over the whole run."
    )
    return Table("results", "Results", head, tuple(rows), note)


def parameters(groups: Sequence[Group]) -> Table:
    """Parameters and payload of a client, as in arXiv 2502.18910, table 1."""
    rows = []
    for group in groups:
        run = group.first
        base, adapter = _parameters(run)
        trained = np.concatenate([one.clients["trained_parameters"] for one in group.runs])
        least, most = (int(trained.min()), int(trained.max())) if trained.size else (0, 0)
        whole = base + adapter if base is not None and adapter is not None else None
        rows.append(
            (
                group.label,
                str(run.config["model.name_or_path"]).rstrip("/").rpartition("/")[2],
                f"{whole:,}" if whole is not None else NOT_RECORDED,
                _range(least, most) if trained.size else NOT_RECORDED,
                f"{most / whole:.4%}" if whole and trained.size else NOT_RECORDED,
                _payload(
                    group,
                    "comm/client_payload_pickled_mib",
                    lambda value: f"{value:.2f} MiB" if value >= 0.1 else f"{value:.2g} MiB",
                ),
                _payload(group, "comm/client_payload_bytes", lambda value: f"{int(value):,} bytes"),
            )
        )
    head = (
        "configuration",
        "base model",
        "all parameters",
        "trained by a client",
        "share",
        "largest payload, pickled",
        "largest payload, factors",
    )
    note = (
        "All parameters are those of the base and the adapter together. What a client trains and sends is of the "
        "clients that took part, in all rounds and seeds: least to most trained, and what the one that sent most sent "
        "in a round, in one direction. Pickled is as the paper's table 1 counts it, of an adapter of the largest ranks "
        "of all clients, and recorded where a client sent one."
    )
    if any(NOT_RECORDED in row[2] for row in rows):
        note += " Where it says 'not recorded', run.json has no entry `parameters` with `base` and `adapter`."
    return Table("parameters", "Parameters and communication cost", head, tuple(rows), note)


def runs_table(groups: Sequence[Group]) -> Table:
    """Every run with a round: where it stands, and what it ran on."""
    rows = []
    for group in groups:
        for run in sorted((*group.runs, *group.left_out), key=lambda one: (one.seed, one.name)):
            commit = run.info.get("source") or {}
            gpus = (run.info.get("hardware") or {}).get("gpus") or []
            rows.append(
                (
                    run.name,
                    group.label,
                    str(run.seed),
                    run.status if run in group.runs else f"{run.status}, left out",
                    f"{len(run.metrics)} of {run.config['run.rounds']}",
                    str(commit.get("commit") or "unknown")[:10]
                    + (" with changes" if commit.get("dirty") else ""),
                    f"{len(gpus)} GPUs" if gpus else "CPU",
                    str(run.info.get("world_size", "unknown")),
                )
            )
    head = ("run", "configuration", "seed", "status", "rounds", "commit", "device", "processes")
    return Table("runs", "Runs", head, tuple(rows), "In the order of the figures.")


def _difference(group: Group, baseline: Group) -> str:
    """Of the final test losses at equal seeds, with its sign."""
    if group is baseline:
        return "the baseline"
    spread = group.difference(baseline, lambda run: run.last("test/loss"))
    return "no seed in common" if spread is None else _text(spread, _signed)


def _parameters(run: RunRecord) -> tuple[int | None, int | None]:
    recorded = run.info.get("parameters")
    counts = recorded if isinstance(recorded, dict) else {}
    base, adapter = counts.get("base"), counts.get("adapter")
    return base if isinstance(base, int) else None, adapter if isinstance(adapter, int) else None


def _range(least: int, most: int) -> str:
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def _payload(group: Group, key: str, shown: Callable[[float], str]) -> str:
    values = [value for run in group.runs for value in run.values(key).values()]
    return shown(max(values)) if values else NOT_RECORDED


def _best_loss(run: RunRecord) -> float | None:
    return min(run.values("test/loss").values(), default=None)


def _best_round(group: Group) -> str:
    rounds = []
    for run in group.runs:
        values = run.values("test/loss")
        if values:
            rounds.append(min(values, key=lambda index, values=values: values[index]) + 1)  # type: ignore[misc]
    if not rounds:
        return ""
    return f" ({min(rounds)})" if min(rounds) == max(rounds) else f" ({min(rounds)} to {max(rounds)})"


def _all_bytes(run: RunRecord) -> float | None:
    sent = [*run.values("comm/uplink_bytes").values(), *run.values("comm/downlink_bytes").values()]
    return math.fsum(sent) if sent else None


def _text(spread: Spread | None, shown: Callable[[float], str]) -> str:
    """`mean ± std [least, most]`, the mean alone where nothing varies or there is one run."""
    if spread is None:
        return "not measured"
    if math.isnan(spread.mean):
        return "not finite"
    if spread.std is None or spread.low == spread.high:
        return shown(spread.mean)
    return (
        f"{shown(spread.mean)} ± {shown(spread.std).lstrip('+')} [{shown(spread.low)}, {shown(spread.high)}]"
    )


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _small(value: float) -> str:
    return f"{value:.3g}"


def _count(value: float) -> str:
    return f"{value:g}"


def amount_of_bytes(value: float) -> str:
    """Three digits and a binary unit."""
    for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:g} bytes"


def _seconds(value: float) -> str:
    return f"{value:.3g}"
