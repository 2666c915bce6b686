"""Memory and time of FlexLoRA rounds with many clients, against the same rounds with few.

    python benchmarks/flexlora_scale.py SOURCE MODEL [--clients 1519 100] [--processes 4] [--rounds 12] [KEY=VALUE ...]

SOURCE is a JSONL file with one line for each client (data.instruction.format=client_lines), MODEL a folder or an id.
Each federation is a run of its own on as many of the lines, spread evenly, so that the small one reads a small corpus;
both train equally many clients a round (--cohort). Runs are started by torchrun in a temporary folder. While one goes
on, this process reads its processes' /proc/PID/smaps_rollup and watches metrics.jsonl grow.

    setup s    from the start of torchrun to the start of the first round
    s/round    median wall time from one record to the next: all of a round, its writing to the disk as well
    training   share of that in which some process was still training its clients (time/train_s + time/wait_s)
    gathering, aggregating, evaluating   the same for the exchange of factors, the server's mathematics, the global test
    other      the rest: records, checkpoints, and bookkeeping
    RSS        MiB a process, all that is mapped and present; mean of the processes and of the later half of the rounds
    own        of that, what belongs to the process alone and is written to (Private_Dirty)
    growth     own memory in the later half of the rounds against the earlier, of the process in which it grew most

The first two rounds warm up and are not counted; nor is the memory after the last one, when the adapter is written. The
server's mathematics is shared out over the processes (aggregation.svd_placement=sharded), which changes no bits. With
--limits, the exit status is 1 where memory grows by more than 3 %, where a large federation needs more than 1.1 times
the memory of the smallest, or where more than 10 % of a round is not training. A table comes first, one JSON object is
the last line.
"""

import argparse
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from watching import MEMORY, Samples, cpu_name, watch

WARM_UP = 2
SETTINGS = (
    "data.instruction.format=client_lines",
    "data.instruction.loss_on=all",
    "data.partition.name=natural",
    "data.partition.min_examples=1",
    "data.test_fraction=0.02",
    "data.max_tokens=128",
    "lora.distribution=heavy_tail_light",
    "lora.rank_scale=0.125",
    "lora.lora_alpha=2.0",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.pack.num_packs=8",
    "strategy.name=flexlora",
    "aggregation.svd_placement=sharded",
    "evaluation.client_test=off",
    "evaluation.every_rounds=5",
    "evaluation.max_test_examples=100",
    "checkpoint.every_rounds=5",
    "tracking.wandb.mode=disabled",
    "tracking.progress=off",
)
GROWTH_LIMIT, RATIO_LIMIT, OUTSIDE_LIMIT = 0.03, 1.1, 0.1


def main() -> int:
    options = _parse()
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{options.processes} processes, {options.cohort} clients a round, {options.rounds} rounds\n")
    print(
        "clients  setup s  s/round  training  gathering  aggregating  evaluating   other  RSS MiB  own MiB   growth  "
        "test loss"
    )
    rows = []
    for clients in options.clients:
        row = _measure(options, clients)
        rows.append(row)
        print(
            f"{clients:7,d} {row['setup_s']:8.1f} {row['round_s']:8.2f} {row['training']:9.1%} "
            f"{row['gathering']:10.1%} {row['aggregating']:12.1%} {row['evaluating']:11.1%} {row['other']:7.1%} "
            f"{row['rss_mib']:8.1f} {row['own_mib']:8.1f} {row['growth']:8.2%} "
            f"{row['test_loss_first']:5.3f} to {row['test_loss_last']:5.3f}",
            flush=True,
        )
    missed = _missed(rows)
    print("\n" + ("\n".join(missed) if missed else "memory and time are within the limits"))
    record = {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "processes": options.processes,
        "rounds": options.rounds,
        "cohort": options.cohort,
        "overrides": options.overrides,
        "rows": rows,
        "missed": missed,
    }
    print(json.dumps({"benchmark": "flexlora_scale", **record}))
    return 1 if missed and options.limits else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="JSONL or .jsonl.gz, one line for each client")
    parser.add_argument("model", help="folder or id of the base")
    parser.add_argument("--clients", type=int, nargs="+", default=[1519, 100], help="federations to compare")
    parser.add_argument("--cohort", type=int, default=80, help="clients of a round")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12, help=f"the first {WARM_UP} are not counted")
    parser.add_argument("--limits", action="store_true", help="exit with 1 where a limit is missed")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as for fedsim.main")
    options = parser.parse_intermixed_args()
    if options.rounds < WARM_UP + 3 or min(options.clients) < options.cohort:
        parser.error(f"at least {WARM_UP + 3} rounds, and --clients of at least --cohort, are needed")
    return options


def _missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    smallest = min(rows, key=lambda row: row["clients"])
    missed = []
    for row in rows:
        outside = 1.0 - row["training"]
        if row["growth"] > GROWTH_LIMIT:
            missed.append(f"{row['clients']} clients: memory grew by {row['growth']:.1%}")
        if outside > OUTSIDE_LIMIT:
            missed.append(f"{row['clients']} clients: {outside:.1%} of a round are not training")
        for kind in MEMORY.values():
            if row[kind] > RATIO_LIMIT * smallest[kind]:
                ratio = row[kind] / smallest[kind]
                missed.append(
                    f"{row['clients']} clients: {kind} is {ratio:.2f} times that of {smallest['clients']}"
                )
    return missed


def _measure(options: argparse.Namespace, clients: int) -> dict[str, Any]:
    """A run of `clients` clients in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "clients.jsonl"
        _write_some_lines(Path(options.source), source, clients)
        keys = [
            f"data.source={source}",
            f"data.partition.num_clients={clients}",
            f"model.name_or_path={options.model}",
            f"lora.target_modules=[{', '.join(_linear_modules(options.model))}]",
            f"cohort.size={options.cohort}",
            f"run.output_dir={folder}",
            "run.name=run",
            f"run.rounds={options.rounds}",
            *SETTINGS,
            *options.overrides,
        ]
        began = time.monotonic()
        load = os.getloadavg()[0]
        metrics = folder / "run" / "metrics.jsonl"
        samples, arrivals = watch(options.processes, keys, metrics, folder / "output.txt")
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {
        "clients": clients,
        "load_before": load,
        "setup_s": arrivals[0] - records[0]["time/round_s"] - began,
        **_times(records, arrivals),
        **_memory(samples),
        "uplink_mib": records[-1]["comm/uplink_bytes"] / 2**20,
        "tokens_per_s": statistics.median(record["train/tokens_per_s"] for record in records[WARM_UP:]),
        "test_loss_first": records[0]["test/loss_initial"],
        "test_loss_last": records[-1]["test/loss"],
    }


def _write_some_lines(source: Path, target: Path, count: int) -> None:
    """`count` lines of a file, spread evenly over it."""
    with gzip.open(source) if source.suffix == ".gz" else source.open("rb") as stream:
        lines = [line for line in stream if line.strip()]
    if count > len(lines):
        sys.exit(f"{source} must hold a line for each of {count} clients, got {len(lines)}")
    target.write_bytes(b"".join(lines[place * len(lines) // count] for place in range(count)))


def _linear_modules(model: str) -> tuple[str, ...]:
    """All of attention and feed-forward, which FlexLoRA adapts, by the names of the model's family."""
    config = Path(model) / "config.json"
    family = json.loads(config.read_text(encoding="utf-8"))["model_type"] if config.is_file() else "opt"
    if family == "opt":
        return ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    return ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _times(records: Sequence[dict[str, Any]], arrivals: Sequence[float]) -> dict[str, float]:
    """Wall time of a round, and what it goes to; sums over the rounds that count, so that rarer work has its share."""
    counted = records[WARM_UP:]
    walls = [
        later - earlier for earlier, later in zip(arrivals[WARM_UP - 1 :], arrivals[WARM_UP:], strict=False)
    ]
    whole = sum(walls)

    def share(*phases: str) -> float:
        return sum(record[f"time/{phase}"] for record in counted for phase in phases) / whole

    shares = {
        "training": share("train_s", "wait_s"),
        "gathering": share("gather_s"),
        "aggregating": share("aggregate_s"),
        "evaluating": share("evaluate_s"),
    }
    idle = statistics.median(record["ranks/idle_share"] for record in counted)
    return {"round_s": statistics.median(walls), **shares, "other": 1.0 - sum(shares.values()), "idle": idle}


def _memory(samples: Samples) -> dict[str, float]:
    """MiB of a process in the later half of the rounds that count, and growth since the earlier half."""
    rounds = sorted(done for done in samples if done >= WARM_UP)[:-1]
    halves = rounds[: len(rounds) // 2], rounds[-(len(rounds) // 2) :]

    def mean(half: Sequence[int], process: int, kind: str) -> float:
        medians = [[one[kind] for one in samples[done][process]] for done in half if process in samples[done]]
        return statistics.fmean(map(statistics.median, medians))

    processes = samples[rounds[-1]]
    earlier, later = halves
    growth = max(mean(later, one, "own_mib") / mean(earlier, one, "own_mib") - 1.0 for one in processes)
    means = {kind: statistics.fmean(mean(later, one, kind) for one in processes) for kind in MEMORY.values()}
    return {**means, "growth": growth}


if __name__ == "__main__":
    sys.exit(main())
